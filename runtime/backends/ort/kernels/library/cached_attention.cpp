// lvlm.lowered::AppendedAttention, WrittenAttention and ReadAttention: attention of one new token a row over
// the valid entries of its cache. Functions of the first two are ONNX Runtime's GroupQueryAttention, which
// reads keys and values once for each query head; here a group of heads reads them once, in runs of entries
// that are tasks. Of entries in 8 bits nothing is spread in memory.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cached_attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "entry_run-inl.h"
#include "op.h"
#include "padded.h"
#include "rotary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class T, class C>
void TurnOut(const Turned<T>& turned, C* to) {
    Padded wide(turned.width);
    Turn(turned, wide.data());
    StoreEntry(wide.data(), turned.width, to);
}

void AttendRunFloat(const EntryRun<float>& run) { AttendRun(run); }
void AttendRunHalf(const EntryRun<Half>& run) { AttendRun(run); }
void AttendRunBytes(const EntryRun<int8_t>& run) { AttendRun(run); }
void TurnFloat(const Turned<float>& turned, float* to) { Turn(turned, to); }
void TurnHalf(const Turned<Half>& turned, float* to) { Turn(turned, to); }
void TurnOutFloat(const Turned<float>& turned, float* to) { TurnOut(turned, to); }
void TurnOutHalf(const Turned<Half>& turned, Half* to) { TurnOut(turned, to); }
void TurnFloatToBytes(const Turned<float>& turned, int8_t* to) { TurnOut(turned, to); }
void TurnHalfToBytes(const Turned<Half>& turned, int8_t* to) { TurnOut(turned, to); }
void ScaleOutFloat(const float* from, size_t n, float by, float* to) { CopyScaledOut(from, n, by, to); }
void ScaleOutHalf(const float* from, size_t n, float by, Half* to) { CopyScaledOut(from, n, by, to); }

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cmath>
#include <cstring>

namespace lvlm {
namespace {

HWY_EXPORT(AttendRunFloat);
HWY_EXPORT(AttendRunHalf);
HWY_EXPORT(TurnFloat);
HWY_EXPORT(TurnHalf);
HWY_EXPORT(TurnOutFloat);
HWY_EXPORT(TurnOutHalf);
HWY_EXPORT(AttendRunBytes);
HWY_EXPORT(TurnFloatToBytes);
HWY_EXPORT(TurnHalfToBytes);
HWY_EXPORT(ScaleOutFloat);
HWY_EXPORT(ScaleOutHalf);

void attend(const EntryRun<float>& run) { HWY_DYNAMIC_DISPATCH(AttendRunFloat)(run); }
void attend(const EntryRun<Half>& run) { HWY_DYNAMIC_DISPATCH(AttendRunHalf)(run); }
void attend(const EntryRun<int8_t>& run) { HWY_DYNAMIC_DISPATCH(AttendRunBytes)(run); }
void turn(const Turned<float>& t, float* to) { HWY_DYNAMIC_DISPATCH(TurnFloat)(t, to); }
void turn(const Turned<Half>& t, float* to) { HWY_DYNAMIC_DISPATCH(TurnHalf)(t, to); }
void turn_out(const Turned<float>& t, float* to) { HWY_DYNAMIC_DISPATCH(TurnOutFloat)(t, to); }
void turn_out(const Turned<Half>& t, Half* to) { HWY_DYNAMIC_DISPATCH(TurnOutHalf)(t, to); }
void turn_out(const Turned<float>& t, int8_t* to) { HWY_DYNAMIC_DISPATCH(TurnFloatToBytes)(t, to); }
void turn_out(const Turned<Half>& t, int8_t* to) { HWY_DYNAMIC_DISPATCH(TurnHalfToBytes)(t, to); }
void scale_out(const float* from, size_t n, float by, float* to) {
    HWY_DYNAMIC_DISPATCH(ScaleOutFloat)(from, n, by, to);
}
void scale_out(const float* from, size_t n, float by, Half* to) {
    HWY_DYNAMIC_DISPATCH(ScaleOutHalf)(from, n, by, to);
}

// One row's new token.
template <class T>
struct NewToken {
    const T* query;  // [heads, width]
    const T* key;    // [key heads, width]; null: the cache has it
    const T* value;
    const T* cos;  // [width / 2]; null: nothing is turned
    const T* sin;
};

// Queries are of T, entries of C.
template <class T, class C>
class CachedAttention {
public:
    static constexpr const char* kDomain = "lvlm.lowered";
    static constexpr Port kOutputs[] = {{element<T>()}, {element<C>()}, {element<C>()}};

    explicit CachedAttention(const Attributes& attributes)
        : heads_(attributes.integer("num_heads", 0)),
          key_heads_(attributes.integer("kv_num_heads", 0)),
          scale_(attributes.number("scale")) {
        require(heads_ > 0 && key_heads_ > 0 && heads_ % key_heads_ == 0, "heads do not fit");
    }

protected:
    // ``cache``: the index of the first of the inputs past_key, past_value and last; ``given``: the cache is
    // an output, too
    void attend_all(const Call& call, size_t cache, const std::vector<NewToken<T>>& rows,
                    bool given = true) const {
        const auto past_key = call.input<C>(cache, 4), past_value = call.input<C>(cache + 1, 4);
        const auto last = call.input<int32_t>(cache + 2, 1);
        const size_t batch = rows.size(), slots = past_key.dim(2), entry = past_key.dim(3);
        const size_t group = heads_ / key_heads_, width = entry - kScaled<C>;
        require(past_key.shape == past_value.shape && past_key.dim(0) == int64_t(batch) &&
                    past_key.dim(1) == int64_t(key_heads_) && last.dim(0) == int64_t(batch) &&
                    width % kLine == 0,
                "queries and cache do not fit");
        const auto output = call.output<T>(0, {int64_t(batch), 1, int64_t(heads_ * width)});
        // Of what is read alone nothing is written
        C *keys = const_cast<C*>(past_key.data), *values = const_cast<C*>(past_value.data);
        if (given) {
            keys = call.output<C>(1, past_key.shape).data;
            values = call.output<C>(2, past_value.shape).data;
        }

        const size_t runs = (slots + kRun - 1) / kRun, count = batch * key_heads_;
        Padded queries(count * group * width), sums(count * runs * group * width);
        Padded most(count * runs * group), weights(count * runs * group);
        std::vector<std::pair<size_t, size_t>> tasks;  // head, run
        for (size_t head = 0; head < count; ++head) {
            const NewToken<T>& row = rows[head / key_heads_];
            const int32_t slot = last.data[head / key_heads_];
            require(slot >= 0 && size_t(slot) < slots, "an entry goes beyond the cache");
            const size_t h = head % key_heads_, at = head * slots * entry;
            for (size_t g = 0; g < group; ++g)
                turn({row.query + (h * group + g) * width, row.cos, row.sin, width, scale_},
                     queries.data() + (head * group + g) * width);
            const size_t before = (slot + (row.key == nullptr)) * entry;
            keep(past_key.data + at, before, keys + at);
            keep(past_value.data + at, before, values + at);
            if (row.key != nullptr) {
                turn_out(Turned<T>{row.key + h * width, row.cos, row.sin, width, 1}, keys + at + before);
                turn_out(Turned<T>{row.value + h * width, nullptr, nullptr, width, 1}, values + at + before);
            }
            for (size_t run = 0; run * kRun <= size_t(slot); ++run) tasks.emplace_back(head, run);
        }
        call.parallel(tasks.size(), [&](size_t task) {
            const auto [head, run] = tasks[task];
            const size_t valid = last.data[head / key_heads_] + 1, place = (head * runs + run) * group;
            const size_t at = (head * slots + run * kRun) * entry;
            attend(EntryRun<C>{group, width, std::min(kRun, valid - run * kRun),
                               queries.data() + head * group * width, keys + at, values + at,
                               sums.data() + place * width, most.data() + place, weights.data() + place});
        });
        for (size_t head = 0; head < count; ++head) {
            const size_t used = last.data[head / key_heads_] / kRun + 1;
            for (size_t g = 0; g < group; ++g)
                join(used, group, width, head * runs * group + g, most, weights, sums,
                     output.data + (head * group + g) * width);
        }
    }

    size_t heads_, key_heads_;

private:
    // Entries before the new one, where the cache is not bound in place.
    static void keep(const C* from, size_t count, C* to) {
        if (from != to) std::memcpy(to, from, count * sizeof(C));
    }

    // The runs of one head are one softmax.
    static void join(size_t used, size_t group, size_t width, size_t first, const Padded& most,
                     const Padded& weights, Padded& sums, T* to) {
        float max = most.data()[first], total = 0;
        for (size_t run = 1; run < used; ++run) max = std::max(max, most.data()[first + run * group]);
        float* result = sums.data() + first * width;
        for (size_t run = 0; run < used; ++run) {
            const size_t at = first + run * group;
            const float factor = std::exp(most.data()[at] - max);
            total += factor * weights.data()[at];
            const float* part = sums.data() + at * width;
            for (size_t i = 0; i < width; ++i)
                result[i] = (run > 0 ? result[i] : 0) + factor * part[i];
        }
        scale_out(result, width, 1 / total, to);
    }

    float scale_;
};

template <class T, class C>
class AppendedAttention : public CachedAttention<T, C> {
public:
    static constexpr const char* kName = "AppendedAttention";
    static constexpr Port kInputs[] = {
        {element<T>()},    {element<C>()}, {element<C>()}, {Element::kInt32},
        {Element::kInt32}, {element<T>()}, {element<T>()}, {Element::kInt64}};

    using CachedAttention<T, C>::CachedAttention;

    void operator()(Call& call) const {
        const auto packed = call.input<T>(0, 3);
        const auto cos = call.input<T>(5, 2), sin = call.input<T>(6, 2);
        const auto positions = call.input<int64_t>(7, 2);
        const int64_t half = cos.dim(1), width = 2 * half, heads = this->heads_;
        const int64_t key_heads = this->key_heads_;
        require(packed.dim(1) == 1 && packed.dim(2) == (heads + 2 * key_heads) * width &&
                    sin.shape == cos.shape && positions.shape == Shape{packed.dim(0), 1} &&
                    call.input<C>(1, 4).dim(3) == int64_t(entry_width<C>(width)),
                "queries, keys, values and rotary angles do not fit");
        std::vector<NewToken<T>> rows;
        for (int64_t row = 0; row < packed.dim(0); ++row) {
            const int64_t at = positions.data[row];
            require(at >= 0 && at < cos.dim(0), "a position is beyond the rotary table");
            const T* query = packed.data + row * packed.dim(2);
            rows.push_back({query, query + heads * width, query + (heads + key_heads) * width,
                            cos.data + at * half, sin.data + at * half});
        }
        this->attend_all(call, 1, rows);
    }
};

template <class T>
class WrittenAttention : public CachedAttention<T, T> {
public:
    static constexpr const char* kName = "WrittenAttention";
    static constexpr Port kInputs[] = {{element<T>()}, {element<T>()},    {element<T>()}, {element<T>()},
                                       {element<T>()}, {Element::kInt32}, {Element::kInt32}};

    using CachedAttention<T, T>::CachedAttention;

    void operator()(Call& call) const {
        const auto query = call.input<T>(0, 3);
        require(query.dim(1) == 1 &&
                    query.dim(2) == int64_t(this->heads_) * call.input<T>(3, 4).dim(3),
                "queries and cache do not fit");
        std::vector<NewToken<T>> rows;
        for (int64_t row = 0; row < query.dim(0); ++row)
            rows.push_back({query.data + row * query.dim(2), nullptr, nullptr, nullptr, nullptr});
        this->attend_all(call, 3, rows);
    }
};

template <class T>
class ReadAttention : public CachedAttention<T, int8_t> {
public:
    static constexpr const char* kName = "ReadAttention";
    static constexpr Port kInputs[] = {
        {element<T>()}, {Element::kInt8}, {Element::kInt8}, {Element::kInt32}, {Element::kInt32}};
    static constexpr Port kOutputs[] = {{element<T>()}};

    using CachedAttention<T, int8_t>::CachedAttention;

    void operator()(Call& call) const {
        const auto query = call.input<T>(0, 3);
        const int64_t width = call.input<int8_t>(1, 4).dim(3) - 1;
        require(query.dim(1) == 1 && query.dim(2) == int64_t(this->heads_) * width,
                "queries and cache do not fit");
        std::vector<NewToken<T>> rows;
        for (int64_t row = 0; row < query.dim(0); ++row)
            rows.push_back({query.data + row * query.dim(2), nullptr, nullptr, nullptr, nullptr});
        this->attend_all(call, 1, rows, false);
    }
};

const Registered<AppendedAttention<float, float>, AppendedAttention<Half, Half>,
                 AppendedAttention<float, int8_t>, AppendedAttention<Half, int8_t>, WrittenAttention<float>,
                 WrittenAttention<Half>, ReadAttention<float>, ReadAttention<Half>>
    registered;

}  // namespace
}  // namespace lvlm
#endif
