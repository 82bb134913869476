// Column sums of attention, a block of query rows at a time (column_sums.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "column_sums.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "attention-inl.h"
#include "column_sums.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class T>
void PackScored(const Scored<T>& scored, size_t head, float* panels) {
    const size_t n = scored.keys.size();
    PackKeys(scored.key + head * scored.positions * scored.width, scored.keys.data(), n, scored.width,
             0, padded_extent(n), panels);
}

// row[i] = cap * tanh(row[i] / cap), i below ``end``, a multiple of a vector; NaN stays NaN
HWY_INLINE void Cap(float* row, size_t end, float cap) {
    const F32 d;
    for (size_t i = 0; i < end; i += hn::Lanes(d)) {
        const Vec x = hn::LoadU(d, row + i);
        const Vec y = hn::Mul(hn::Tanh(d, hn::Div(x, hn::Set(d, cap))), hn::Set(d, cap));
        hn::StoreU(hn::IfThenElse(hn::IsNaN(x), x, y), d, row + i);
    }
}

// Every ``shards``-th block of used rows of one key head; ``sums`` [padded keys].
template <class T>
void SumShard(const Scored<T>& scored, size_t head, const float* panels, size_t shard, size_t shards,
              float* sums) {
    const size_t group = scored.heads / scored.key_heads, width = scored.width;
    const size_t rows = scored.used.size() * group;
    const size_t block = scored.keys.size() > 5120 ? 24 : 48;
    const size_t stride = padded_extent(scored.keys.size()) + kLine;
    Padded query(block * width), logits(block * stride), weight(block);
    for (size_t start = shard * block; start < rows; start += shards * block) {
        const size_t count = std::min(block, rows - start);
        const size_t whole = (count + kRows - 1) / kRows * kRows;
        size_t most = 0;
        for (size_t r = 0; r < count; ++r) {
            const ScoringRow& row = scored.used[(start + r) / group];
            const size_t from = (head * group + (start + r) % group) * scored.rows + row.row;
            CopyScaled(scored.query + from * width, width, scored.scale, query.data() + r * width);
            most = std::max(most, row.visible);
        }
        std::fill(query.data() + count * width, query.data() + whole * width, 0.0f);
        const size_t end = padded_extent(most);
        for (size_t k = 0; k < end; k += PanelWidth())
            for (size_t r = 0; r < whole; r += kRows)
                Product(query.data() + r * width, width, panels + k * width, width,
                        logits.data() + r * stride + k, stride, false);
        for (size_t r = 0; scored.softcap > 0 && r < count; ++r)
            Cap(logits.data() + r * stride, end, scored.softcap);
        for (size_t r = 0; r < count; ++r)
            weight.data()[r] = 1 / Exponentials(logits.data() + r * stride,
                                                scored.used[(start + r) / group].visible, end);
        AddColumns(logits.data(), stride, count, weight.data(), end, sums);
    }
}

void PackFloat(const Scored<float>& s, size_t h, float* p) { PackScored(s, h, p); }
void PackHalf(const Scored<Half>& s, size_t h, float* p) { PackScored(s, h, p); }
void SumFloat(const Scored<float>& s, size_t h, const float* p, size_t i, size_t n, float* to) {
    SumShard(s, h, p, i, n, to);
}
void SumHalf(const Scored<Half>& s, size_t h, const float* p, size_t i, size_t n, float* to) {
    SumShard(s, h, p, i, n, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(PackFloat);
HWY_EXPORT(PackHalf);
HWY_EXPORT(SumFloat);
HWY_EXPORT(SumHalf);

constexpr size_t kShards = 4;  // of one key head

template <class T, class Pack, class Sum>
void sum_all(const Call& call, std::vector<Scored<T>>& batch, Pack pack, Sum sum) {
    const size_t heads = batch.front().key_heads, tasks = heads * kShards;
    for (Scored<T>& scored : batch) {
        const size_t n = scored.keys.size(), padded = padded_extent(n), width = scored.width;
        scored.sums.assign(n, 0);
        if (n == 0 || scored.used.empty()) continue;
        Padded panels(heads * padded * width), parts(tasks * padded);
        std::fill(parts.data(), parts.data() + parts.size(), 0.0f);
        call.parallel(heads, [&](size_t h) { pack(scored, h, panels.data() + h * padded * width); });
        call.parallel(tasks, [&](size_t task) {
            const size_t head = task / kShards;
            sum(scored, head, panels.data() + head * padded * width, task % kShards, kShards,
                parts.data() + task * padded);
        });
        for (size_t task = 0; task < tasks; ++task)
            for (size_t i = 0; i < n; ++i) scored.sums[i] += parts.data()[task * padded + i];
    }
}

}  // namespace

void column_sums(const Call& call, std::vector<Scored<float>>& batch) {
    sum_all(call, batch, HWY_DYNAMIC_DISPATCH(PackFloat), HWY_DYNAMIC_DISPATCH(SumFloat));
}
void column_sums(const Call& call, std::vector<Scored<Half>>& batch) {
    sum_all(call, batch, HWY_DYNAMIC_DISPATCH(PackHalf), HWY_DYNAMIC_DISPATCH(SumHalf));
}

}  // namespace lvlm
#endif
