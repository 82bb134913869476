// The parts of attention, for the instructions that are being compiled for (Highway's foreach_target):
// matrices packed into panels, one product of a few rows with a panel, softmax of rows, their column sums.
#if defined(LVLM_ATTENTION_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_ATTENTION_INL_H
#undef LVLM_ATTENTION_INL_H
#else
#define LVLM_ATTENTION_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using Vec = hn::Vec<F32>;

// Rows and vectors of a product that is held in registers.
#if HWY_TARGET == HWY_AVX2
constexpr size_t kRows = 6;
#else
constexpr size_t kRows = 12;
#endif

HWY_INLINE size_t PanelWidth() { return 2 * hn::Lanes(F32()); }  // divides kPanelMultiple

HWY_INLINE float Widened(float x) { return x; }
HWY_INLINE float Widened(hwy::float16_t x) {
    const hn::CappedTag<float, 1> d;
    const hn::Rebind<hwy::float16_t, decltype(d)> half;
    return hn::GetLane(hn::PromoteTo(d, hn::LoadU(half, &x)));
}
HWY_INLINE float Widened(int8_t x) { return x; }
HWY_INLINE void Narrow(float from, float* to) { *to = from; }
HWY_INLINE void Narrow(float from, hwy::float16_t* to) {
    const hn::CappedTag<float, 1> d;
    const hn::Rebind<hwy::float16_t, decltype(d)> half;
    hn::StoreU(hn::DemoteTo(half, hn::Set(d, from)), half, to);
}

// The lanes at ``from`` in fp32.
HWY_INLINE Vec Load(const float* from) { return hn::LoadU(F32(), from); }
HWY_INLINE Vec Load(const hwy::float16_t* from) {
    const F32 d;
    const hn::Rebind<hwy::float16_t, F32> half;
    return hn::PromoteTo(d, hn::LoadU(half, from));
}
HWY_INLINE Vec Load(const int8_t* from) {
    const F32 d;
    const hn::Rebind<int8_t, F32> bytes;
    return hn::ConvertTo(d, hn::PromoteTo(hn::RebindToSigned<F32>(), hn::LoadU(bytes, from)));
}
HWY_INLINE void Store(Vec x, float* to) { hn::StoreU(x, F32(), to); }
HWY_INLINE void Store(Vec x, hwy::float16_t* to) {
    const hn::Rebind<hwy::float16_t, F32> half;
    hn::StoreU(hn::DemoteTo(half, x), half, to);
}

// to[i] = from[i] * scale, in fp32
template <class T>
HWY_INLINE void CopyScaled(const T* from, size_t count, float scale, float* to) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    size_t i = 0;
    for (; i + lanes <= count; i += lanes)
        Store(hn::Mul(Load(from + i), hn::Set(d, scale)), to + i);
    for (; i < count; ++i) to[i] = Widened(from[i]) * scale;
}

template <class T>
HWY_INLINE void CopyScaledOut(const float* from, size_t count, float scale, T* to) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    size_t i = 0;
    for (; i + lanes <= count; i += lanes)
        Store(hn::Mul(Load(from + i), hn::Set(d, scale)), to + i);
    for (; i < count; ++i) Narrow(from[i] * scale, to + i);
}

// Keys [first, last) of [n, width] into panels [.., width, PanelWidth()]; columns beyond n are 0.
// ``first`` and ``last`` are multiples of the panel's width. ``index``: the n rows to take, or null for all.
template <class T>
void PackKeys(const T* keys, const int64_t* index, size_t n, size_t width, size_t first, size_t last,
              float* panels) {
    const size_t panel = PanelWidth();
    for (size_t start = first; start < last; start += panel) {
        float* to = panels + start * width;
        const size_t valid = start < n ? std::min(panel, n - start) : 0;
        for (size_t column = 0; column < valid; ++column) {
            const T* from = keys + (index ? index[start + column] : start + column) * width;
            for (size_t i = 0; i < width; ++i) to[i * panel + column] = Widened(from[i]);
        }
        for (size_t column = valid; column < panel; ++column)
            for (size_t i = 0; i < width; ++i) to[i * panel + column] = 0;
    }
}

// Values [first, last) of [n, width] into panels [padded width / PanelWidth(), rows, PanelWidth()];
// what lies beyond n and width is 0.
template <class T>
void PackValues(const T* values, size_t n, size_t width, size_t padded_width, size_t rows,
                size_t first, size_t last, float* panels) {
    const size_t panel = PanelWidth();
    for (size_t start = 0; start < padded_width; start += panel) {
        const size_t valid = start < width ? std::min(panel, width - start) : 0;
        float* to = panels + start * rows;
        for (size_t row = first; row < last; ++row) {
            const size_t filled = row < n ? valid : 0;
            if (filled > 0) CopyScaled(values + row * width + start, filled, 1, to + row * panel);
            std::fill(to + row * panel + filled, to + (row + 1) * panel, 0.0f);
        }
    }
}

// c [R, V vectors] (+)= a · b [depth, V vectors]; a is read at a[r * a_row + k * a_step]
template <size_t R, size_t V>
HWY_INLINE void Tile(const float* HWY_RESTRICT a, size_t a_row, size_t a_step,
                     const float* HWY_RESTRICT b, size_t b_row, size_t depth, float* HWY_RESTRICT c,
                     size_t c_row, bool add) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    Vec sum[R][V];
    for (size_t r = 0; r < R; ++r)
        for (size_t v = 0; v < V; ++v)
            sum[r][v] = add ? hn::LoadU(d, c + r * c_row + v * lanes) : hn::Zero(d);
    for (size_t k = 0; k < depth; ++k) {
        Vec right[V];
        for (size_t v = 0; v < V; ++v) right[v] = hn::LoadU(d, b + v * lanes);
        b += b_row;
#pragma GCC unroll 12
        for (size_t r = 0; r < R; ++r) {
            const Vec x = hn::Set(d, a[r * a_row + k * a_step]);
            for (size_t v = 0; v < V; ++v) sum[r][v] = hn::MulAdd(x, right[v], sum[r][v]);
        }
    }
    for (size_t r = 0; r < R; ++r)
        for (size_t v = 0; v < V; ++v) hn::StoreU(sum[r][v], d, c + r * c_row + v * lanes);
}

// c [kRows, panel] (+)= a [kRows, depth] · b [depth, panel]
HWY_INLINE void Product(const float* a, size_t a_row, const float* b, size_t depth, float* c,
                        size_t c_row, bool add) {
    Tile<kRows, 2>(a, a_row, 1, b, PanelWidth(), depth, c, c_row, add);
}

// exp(x - max) of the first ``valid`` in place, 0 up to ``end``, a multiple of the lanes; their sum.
// What is not finite among the valid makes all of them NaN. ``shift``: the max, if asked for.
HWY_INLINE float Exponentials(float* row, size_t valid, size_t end, float* shift_out = nullptr) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    std::fill(row + valid, row + end, -std::numeric_limits<float>::infinity());
    Vec most = hn::Set(d, -std::numeric_limits<float>::infinity()), odd = hn::Zero(d);
    const size_t whole = valid - valid % lanes;
    for (size_t i = 0; i < whole; i += lanes) {
        const Vec x = hn::LoadU(d, row + i);
        most = hn::Max(most, x);
        odd = hn::MulAdd(x, hn::Zero(d), odd);
    }
    float max = hn::GetLane(hn::MaxOfLanes(d, most)), strange = hn::GetLane(hn::SumOfLanes(d, odd));
    for (size_t i = whole; i < valid; ++i) {
        max = std::max(max, row[i]);
        strange += row[i] * 0;
    }
    if (shift_out != nullptr) *shift_out = max;
    if (!(strange == 0)) {
        std::fill(row, row + valid, std::numeric_limits<float>::quiet_NaN());
        std::fill(row + valid, row + end, 0.0f);
        return std::numeric_limits<float>::quiet_NaN();
    }
    const Vec shift = hn::Set(d, max);
    Vec sum = hn::Zero(d);
    for (size_t i = 0; i < end; i += lanes) {
        const Vec x = hn::Exp(d, hn::Sub(hn::LoadU(d, row + i), shift));
        hn::StoreU(x, d, row + i);
        sum = hn::Add(sum, x);
    }
    return hn::GetLane(hn::SumOfLanes(d, sum));
}

// sums[i] += Σ weight[r] * rows[r][i] over the rows, i below ``end``, a multiple of two vectors
HWY_INLINE void AddColumns(const float* rows, size_t stride, size_t count, const float* weight,
                           size_t end, float* sums) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    for (size_t i = 0; i < end; i += 2 * lanes) {
        Vec left = hn::LoadU(d, sums + i), right = hn::LoadU(d, sums + i + lanes);
        for (size_t r = 0; r < count; ++r) {
            const Vec w = hn::Set(d, weight[r]);
            left = hn::MulAdd(w, hn::LoadU(d, rows + r * stride + i), left);
            right = hn::MulAdd(w, hn::LoadU(d, rows + r * stride + i + lanes), right);
        }
        hn::StoreU(left, d, sums + i);
        hn::StoreU(right, d, sums + i + lanes);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
