// lvlm::CausalAttention: attention of a prompt over itself and, if asked, what each position receives.
//
// A block is a run of positions with all query heads of a group, which read the same keys: its logits
// against every key up to its end lie in the second-level cache until they have become output and sums.
// Blocks go to a fixed number of shards, each with sums of its own, so that results do not depend on threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "causal_attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "attention-inl.h"
#include "op.h"
#include "padded.h"

#ifndef LVLM_CAUSAL_ATTENTION_ONCE
#define LVLM_CAUSAL_ATTENTION_ONCE
namespace lvlm {

// One key head of one row of the batch.
template <class T>
struct CausalHead {
    size_t group, positions, width, padded_width, padded_positions;
    size_t valid;         // positions that count; without importance all
    float scale;
    const T* query;       // [group, positions, width]
    const T* key;         // [positions, width]
    const T* value;       // [positions, width]
    T* output;            // [group, positions, width]
    float* keys;          // panels
    float* values;        // panels
};

}  // namespace lvlm
#endif

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

constexpr size_t kDepth = 256;  // keys at a time of the product with the values

template <class T>
void PackHead(const CausalHead<T>& head, size_t first, size_t last) {
    PackKeys(head.key, nullptr, head.positions, head.width, first, last, head.keys);
    PackValues(head.value, head.positions, head.width, head.padded_width, head.padded_positions,
               first, last, head.values);
}

// Positions of a block: whole register blocks of rows for any group.
inline size_t BlockPositions(size_t group, size_t positions) {
    const size_t rows = positions > 5120 ? 24 : 48;  // of logits that the cache holds
    size_t step = kRows;
    for (size_t few = 1; few < kRows; ++few)
        if (few * group % kRows == 0) {
            step = few;
            break;
        }
    return std::max<size_t>(1, rows / (step * group)) * step;
}

// Blocks of one shard: from both ends, as late ones take longer. ``sums`` [padded positions] or null.
template <class T>
void AttendShard(const CausalHead<T>& head, size_t shard, size_t shards, float* sums) {
    const size_t panel = PanelWidth(), width = head.width, group = head.group;
    const size_t step = BlockPositions(group, head.positions);
    const size_t blocks = (head.positions + step - 1) / step, rows = step * group;
    const size_t stride = head.padded_positions + kLine;  // an odd number of cache lines
    Padded query(rows * width), logits(rows * stride), output(rows * head.padded_width);
    Padded weight(rows);

    for (size_t block = 0; block < blocks; ++block) {
        const size_t turn = block % (2 * shards);
        if (turn != shard && turn != 2 * shards - 1 - shard) continue;
        const size_t start = block * step, stop = std::min(start + step, head.positions);
        const size_t count = (stop - start) * group;
        const size_t used_rows = (count + kRows - 1) / kRows * kRows;
        const size_t counted = std::clamp(head.valid, start, stop) - start;  // positions
        if (counted == 0) {
            for (size_t g = 0; g < group; ++g) {
                T* to = head.output + (g * head.positions + start) * width;
                std::fill(to, to + (stop - start) * width, T{});
            }
            continue;
        }
        for (size_t r = 0; r < count; ++r) {
            const size_t at = (r % group) * head.positions + start + r / group;
            CopyScaled(head.query + at * width, width, head.scale, query.data() + r * width);
        }
        std::fill(query.data() + count * width, query.data() + used_rows * width, 0.0f);

        const size_t end = (stop + kPanelMultiple - 1) / kPanelMultiple * kPanelMultiple;
        for (size_t k = 0; k < end; k += panel)
            for (size_t r = 0; r < used_rows; r += kRows)
                Product(query.data() + r * width, width, head.keys + k * width, width,
                        logits.data() + r * stride + k, stride, false);
        for (size_t r = 0; r < count; ++r)
            weight.data()[r] =
                1 / Exponentials(logits.data() + r * stride, start + r / group + 1, end);
        for (size_t k = 0; k < end; k += kDepth)
            for (size_t c = 0; c < head.padded_width; c += panel)
                for (size_t r = 0; r < used_rows; r += kRows)
                    Product(logits.data() + r * stride + k, stride,
                            head.values + c * head.padded_positions + k * panel,
                            std::min(kDepth, end - k), output.data() + r * head.padded_width + c,
                            head.padded_width, k > 0);
        for (size_t r = 0; r < count; ++r) {
            const size_t at = (r % group) * head.positions + start + r / group;
            CopyScaledOut(output.data() + r * head.padded_width, width, weight.data()[r],
                          head.output + at * width);
        }
        if (sums != nullptr)
            AddColumns(logits.data(), stride, counted * group, weight.data(), end, sums);
    }
}

void PackFloat(const CausalHead<float>& h, size_t a, size_t b) { PackHead(h, a, b); }
void PackHalf(const CausalHead<Half>& h, size_t a, size_t b) { PackHead(h, a, b); }
void AttendFloat(const CausalHead<float>& h, size_t i, size_t n, float* s) { AttendShard(h, i, n, s); }
void AttendHalf(const CausalHead<Half>& h, size_t i, size_t n, float* s) { AttendShard(h, i, n, s); }

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(PackFloat);
HWY_EXPORT(PackHalf);
HWY_EXPORT(AttendFloat);
HWY_EXPORT(AttendHalf);

void pack(const CausalHead<float>& h, size_t a, size_t b) { HWY_DYNAMIC_DISPATCH(PackFloat)(h, a, b); }
void pack(const CausalHead<Half>& h, size_t a, size_t b) { HWY_DYNAMIC_DISPATCH(PackHalf)(h, a, b); }
void attend(const CausalHead<float>& h, size_t i, size_t n, float* s) {
    HWY_DYNAMIC_DISPATCH(AttendFloat)(h, i, n, s);
}
void attend(const CausalHead<Half>& h, size_t i, size_t n, float* s) {
    HWY_DYNAMIC_DISPATCH(AttendHalf)(h, i, n, s);
}

constexpr size_t kShards = 8;  // of one key head
constexpr size_t kPacked = 256;  // keys that one task packs

template <class T>
class CausalAttention {
public:
    static constexpr const char* kName = "CausalAttention";
    static constexpr Port kInputs[] = {
        {element<T>()}, {element<T>()}, {element<T>()}, {Element::kInt64, true}};
    static constexpr Port kOutputs[] = {{element<T>()}, {Element::kFloat, true}};

    explicit CausalAttention(const Attributes& attributes) : scale_(attributes.number("scale")) {}

    void operator()(Call& call) const {
        const auto query = call.input<T>(0, 4), key = call.input<T>(1, 4), value = call.input<T>(2, 4);
        const auto length = call.input<int64_t>(3, 1);
        const size_t batch = query.dim(0), heads = query.dim(1), positions = query.dim(2);
        const size_t width = query.dim(3), key_heads = key.dim(1);
        require(key.shape == value.shape && key.dim(0) == query.dim(0) && key.dim(2) == query.dim(2) &&
                    key.dim(3) == query.dim(3) && key_heads > 0 && heads % key_heads == 0,
                "query, key and value do not fit");
        const auto output = call.output<T>(0, query.shape);
        const auto importance =
            length ? call.output<float>(1, {query.dim(0), query.dim(2)}) : Tensor<float>{};
        if (query.dim(0) == 0 || positions == 0) return;

        const size_t padded = padded_extent(positions), padded_width = padded_extent(width);
        const size_t count = batch * key_heads, group = heads / key_heads;
        Padded keys(count * padded * width), values(count * padded * padded_width);
        std::vector<CausalHead<T>> each(count);
        for (size_t i = 0; i < count; ++i) {
            const size_t row = i / key_heads;
            const size_t valid =
                length ? std::clamp<int64_t>(length.data[row], 0, positions) : positions;
            each[i] = {group, positions, width, padded_width, padded, valid, scale_,
                       query.data + i * group * positions * width,
                       key.data + i * positions * width, value.data + i * positions * width,
                       output.data + i * group * positions * width,
                       keys.data() + i * padded * width, values.data() + i * padded * padded_width};
        }
        const size_t parts = (padded + kPacked - 1) / kPacked;
        call.parallel(count * parts, [&](size_t task) {
            const size_t first = task % parts * kPacked;
            pack(each[task / parts], first, std::min(first + kPacked, padded));
        });

        Padded sums(importance ? count * kShards * padded : 0);
        std::fill(sums.data(), sums.data() + sums.size(), 0.0f);
        call.parallel(count * kShards, [&](size_t task) {
            attend(each[task / kShards], task % kShards, kShards,
                   importance ? sums.data() + task * padded : nullptr);
        });
        if (importance) mean(sums, each, key_heads, heads, importance);
    }

private:
    static void mean(const Padded& sums, const std::vector<CausalHead<T>>& each, size_t key_heads,
                     size_t heads, const Tensor<float>& importance) {
        const size_t positions = importance.dim(1), parts = key_heads * kShards;
        const size_t padded = padded_extent(positions);
        for (size_t row = 0; row < static_cast<size_t>(importance.dim(0)); ++row) {
            float* to = importance.data + row * positions;
            std::fill(to, to + positions, 0.0f);
            for (size_t part = row * parts; part < (row + 1) * parts; ++part)
                for (size_t i = 0; i < each[row * key_heads].valid; ++i)
                    to[i] += sums.data()[part * padded + i];
            for (size_t i = 0; i < positions; ++i) to[i] /= static_cast<float>(heads);
        }
    }

    float scale_;
};

const Registered<CausalAttention<float>, CausalAttention<Half>> registered;

}  // namespace
}  // namespace lvlm
#endif
