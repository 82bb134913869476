// Entries of a cache to and from floats.
#if defined(LVLM_ENTRIES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_ENTRIES_INL_H
#undef LVLM_ENTRIES_INL_H
#else
#define LVLM_ENTRIES_INL_H
#endif

#include "attention-inl.h"
#include "entries.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class C>
HWY_INLINE void LoadEntry(const C* from, size_t width, float* to) {
    if constexpr (kScaled<C>)
        CopyScaled(from, width, step_of(from, width, steps().step), to);
    else
        CopyScaled(from, width, 1, to);
}

// The largest magnitude; NaN where a number is not finite.
HWY_INLINE float Largest(const float* from, size_t width) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    Vec most = hn::Zero(d), odd = hn::Zero(d);
    size_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        const Vec x = Load(from + i);
        most = hn::Max(most, hn::Abs(x));
        odd = hn::MulAdd(x, hn::Zero(d), odd);
    }
    float largest = hn::GetLane(hn::MaxOfLanes(d, most)), strange = hn::GetLane(hn::SumOfLanes(d, odd));
    for (; i < width; ++i) {
        largest = std::max(largest, std::abs(from[i]));
        strange += from[i] * 0;
    }
    return largest + strange;
}

HWY_INLINE void StoreEntry(const float* from, size_t width, int8_t* to) {
    const Steps& all = steps();
    const float least_step = Largest(from, width) * kOfLargest;
    const bool fits = least_step <= all.step[kBeyond - 1];  // not true of NaN
    const size_t place = fits ? std::lower_bound(all.step, all.step + kBeyond, least_step) - all.step : kBeyond;
    to[width] = static_cast<int8_t>(static_cast<int>(place) + kLowestScale);
    if (place == kBeyond) return std::fill(to, to + width, int8_t{0});
    const float per_step = all.per_step[place], bound = 127;
    const F32 d;
    const hn::Rebind<int8_t, F32> bytes;
    const size_t lanes = hn::Lanes(d);
    const Vec by = hn::Set(d, per_step), most = hn::Set(d, bound), least = hn::Set(d, -bound);
    size_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        const Vec scaled = hn::Min(hn::Max(hn::Mul(Load(from + i), by), least), most);
        hn::StoreU(hn::DemoteTo(bytes, hn::NearestInt(scaled)), bytes, to + i);
    }
    for (; i < width; ++i)
        to[i] = static_cast<int8_t>(std::nearbyint(std::min(std::max(from[i] * per_step, -bound), bound)));
}
template <class C>
HWY_INLINE void StoreEntry(const float* from, size_t width, C* to) {
    CopyScaledOut(from, width, 1, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
