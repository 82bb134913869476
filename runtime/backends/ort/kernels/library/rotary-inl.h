// Rotary embedding of one head, as attention over a cache applies it to queries and new keys.
#ifndef LVLM_ROTARY_ONCE
#define LVLM_ROTARY_ONCE
#include <cstddef>

namespace lvlm {

// Halves of [width] turned by angles with these cosines and sines [width / 2].
template <class T>
struct Turned {
    const T* from;
    const T* cos;  // null: as it is
    const T* sin;
    size_t width;
    float scale;
};

}  // namespace lvlm
#endif

#if defined(LVLM_ROTARY_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_ROTARY_INL_H
#undef LVLM_ROTARY_INL_H
#else
#define LVLM_ROTARY_INL_H
#endif

#include "attention-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class T>
void Turn(const Turned<T>& turned, float* to) {
    const size_t half = turned.width / 2;
    if (turned.cos == nullptr) return CopyScaled(turned.from, turned.width, turned.scale, to);
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    size_t i = 0;
    for (; i + lanes <= half; i += lanes) {
        const Vec a = Load(turned.from + i), b = Load(turned.from + half + i);
        const Vec c = Load(turned.cos + i), s = Load(turned.sin + i), f = hn::Set(d, turned.scale);
        Store(hn::Mul(f, hn::Sub(hn::Mul(a, c), hn::Mul(b, s))), to + i);
        Store(hn::Mul(f, hn::Add(hn::Mul(a, s), hn::Mul(b, c))), to + half + i);
    }
    for (; i < half; ++i) {
        const float a = Widened(turned.from[i]), b = Widened(turned.from[half + i]);
        const float c = Widened(turned.cos[i]), s = Widened(turned.sin[i]);
        to[i] = turned.scale * (a * c - b * s);
        to[half + i] = turned.scale * (a * s + b * c);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
