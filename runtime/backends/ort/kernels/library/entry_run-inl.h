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

#if HWY_TARGET == HWY_AVX2
constexpr size_t kHeads = 3;  // whose sums of four vectors registers hold
#else
constexpr size_t kHeads = 4;
#endif

// logits[g, j] = query g · key j, for kCount heads
template <size_t kCount, class T>
HWY_INLINE void Logits(const EntryRun<T>& run, size_t first, float* logits) {
    const F32 d;
    const size_t lanes = hn::Lanes(d), width = run.width, row = entry_width<T>(width);
    const float* query = run.query + first * width;
    for (size_t j = 0; j < run.count; ++j) {
        const T* key = run.keys + j * row;
        Vec sum[kCount];
        for (size_t g = 0; g < kCount; ++g) sum[g] = hn::Zero(d);
        for (size_t i = 0; i < width; i += lanes) {
            const Vec k = Load(key + i);
            for (size_t g = 0; g < kCount; ++g)
                sum[g] = hn::MulAdd(k, hn::LoadU(d, query + g * width + i), sum[g]);
        }
        for (size_t g = 0; g < kCount; ++g)
            logits[g * kRun + j] = hn::GetLane(hn::SumOfLanes(d, sum[g]));
        if constexpr (kScaled<T>) {
            const float step = step_of(key, width);
            for (size_t g = 0; g < kCount; ++g) logits[g * kRun + j] *= step;
        }
    }
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
    if constexpr (kScaled<T>)
        for (size_t j = 0; j < run.count; ++j) {
            const float step = step_of(run.values + j * entry_width<T>(run.width), run.width);
            for (size_t g = 0; g < kCount; ++g) weights[g * kRun + j] *= step;
        }
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
