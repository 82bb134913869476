// Attention of one token's heads over a run of cache entries: a part of a softmax.
#ifndef LVLM_ENTRY_RUN_ONCE
#define LVLM_ENTRY_RUN_ONCE
#include <cstddef>

namespace lvlm {

constexpr size_t kRun = 256;  // entries of one task: the result does not depend on threads

// One run of the entries of one key head.
template <class T>
struct EntryRun {
    size_t group, width, count;
    const float* query;  // [group, width], scaled
    const T* keys;       // [count, entry_width<T>(width)]
    const T* values;
    float* output;       // [group, width]: sums of values, weighted by exp(logit - max)
    float* max;          // [group]
    float* sum;          // [group] of the weights
};

}  // namespace lvlm
#endif

#if defined(LVLM_ENTRY_RUN_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_ENTRY_RUN_INL_H
#undef LVLM_ENTRY_RUN_INL_H
#else
#define LVLM_ENTRY_RUN_INL_H
#endif

#include "entries-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

// numbers[g, j] times the step of the numbers of entry j
template <size_t kCount>
HWY_INLINE void Scale(const EntryRun<int8_t>& run, const int8_t* entries, float* numbers) {
    const float* table = steps().step;
    for (size_t j = 0; j < run.count; ++j) {
        const float step = step_of(entries + j * entry_width<int8_t>(run.width), run.width, table);
        for (size_t g = 0; g < kCount; ++g) numbers[g * kRun + j] *= step;
    }
}

#if HWY_TARGET == HWY_AVX2
constexpr size_t kHeads = 3;  // whose sums of four vectors registers hold
#else
constexpr size_t kHeads = 4;
#endif

// The products of one key with kCount queries, lane by lane.
template <size_t kCount, class T>
HWY_INLINE void Meet(const T* key, const float* query, size_t width, Vec* sum) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    for (size_t g = 0; g < kCount; ++g) sum[g] = hn::Zero(d);
    for (size_t i = 0; i < width; i += lanes) {
        const Vec k = Load(key + i);
        for (size_t g = 0; g < kCount; ++g)
            sum[g] = hn::MulAdd(k, hn::LoadU(d, query + g * width + i), sum[g]);
    }
}

// The sum of each of as many rows as there are lanes: neighbours are added, of two rows at a time.
HWY_INLINE Vec SumsOfRows(float* HWY_RESTRICT rows) {
    const F32 d;
#if HWY_TARGET != HWY_SCALAR  // whose rows have one number
    const size_t lanes = hn::Lanes(d);
    for (size_t count = lanes / 2; count > 0; count /= 2)
        for (size_t r = 0; r < count; ++r) {
            const Vec low = hn::Load(d, rows + 2 * r * lanes), high = hn::Load(d, rows + (2 * r + 1) * lanes);
            hn::Store(hn::Add(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low)), d, rows + r * lanes);
        }
#endif
    return hn::Load(d, rows);
}

// logits[g, j] = query g · key j, for kCount heads
template <size_t kCount, class T>
HWY_INLINE void Logits(const EntryRun<T>& run, size_t first, float* logits) {
    const F32 d;
    const size_t lanes = hn::Lanes(d), width = run.width, row = entry_width<T>(width);
    const float* query = run.query + first * width;
    constexpr size_t most = hn::MaxLanes(F32());
    HWY_ALIGN float rows[kCount][most * most];
    Vec sum[kCount];
    size_t j = 0;
    // Entries in fp32 come from memory more slowly than single sums are made, and gain nothing
    for (; sizeof(T) < sizeof(float) && j + lanes <= run.count; j += lanes) {
        for (size_t r = 0; r < lanes; ++r) {
            Meet<kCount>(run.keys + (j + r) * row, query, width, sum);
            for (size_t g = 0; g < kCount; ++g) hn::Store(sum[g], d, rows[g] + r * lanes);
        }
        for (size_t g = 0; g < kCount; ++g) hn::StoreU(SumsOfRows(rows[g]), d, logits + g * kRun + j);
    }
    for (; j < run.count; ++j) {
        Meet<kCount>(run.keys + j * row, query, width, sum);
        for (size_t g = 0; g < kCount; ++g)
            logits[g * kRun + j] = hn::GetLane(hn::SumOfLanes(d, sum[g]));
    }
    if constexpr (kScaled<T>) Scale<kCount>(run, run.keys, logits);
}

// output[g, column …] = Σ weights[g, j] value[j, column …], kVectors of them
template <size_t kCount, size_t kVectors, class T>
HWY_INLINE void Mix(const EntryRun<T>& run, size_t first, const float* weights, size_t column) {
    const F32 d;
    const size_t lanes = hn::Lanes(d), width = run.width, row = entry_width<T>(width);
    Vec sum[kCount][kVectors];
    for (auto& head : sum)
        for (Vec& x : head) x = hn::Zero(d);
    for (size_t j = 0; j < run.count; ++j) {
        const T* value = run.values + j * row + column;
        Vec v[kVectors];
        for (size_t i = 0; i < kVectors; ++i) v[i] = Load(value + i * lanes);
        for (size_t g = 0; g < kCount; ++g) {
            const Vec w = hn::Set(d, weights[g * kRun + j]);
            for (size_t i = 0; i < kVectors; ++i) sum[g][i] = hn::MulAdd(w, v[i], sum[g][i]);
        }
    }
    for (size_t g = 0; g < kCount; ++g)
        for (size_t i = 0; i < kVectors; ++i)
            hn::StoreU(sum[g][i], d, run.output + (first + g) * width + column + i * lanes);
}

template <size_t kCount, class T>
void AttendHeads(const EntryRun<T>& run, size_t first) {
    const size_t lanes = hn::Lanes(F32());
    HWY_ALIGN float weights[kCount * kRun];
    Logits<kCount>(run, first, weights);
    for (size_t g = 0; g < kCount; ++g)
        run.sum[first + g] =
            Exponentials(weights + g * kRun, run.count, (run.count + lanes - 1) / lanes * lanes,
                         run.max + first + g);
    if constexpr (kScaled<T>) Scale<kCount>(run, run.values, weights);
    size_t column = 0;
    for (; column + 4 * lanes <= run.width; column += 4 * lanes)
        Mix<kCount, 4>(run, first, weights, column);
    for (; column < run.width; column += lanes) Mix<kCount, 1>(run, first, weights, column);
}

template <class T>
void AttendRun(const EntryRun<T>& run) {
    size_t first = 0;
    for (; first + kHeads <= run.group; first += kHeads) AttendHeads<kHeads>(run, first);
    for (; first < run.group; ++first) AttendHeads<1>(run, first);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
