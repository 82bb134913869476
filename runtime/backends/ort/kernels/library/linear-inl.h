// A linear layer, rows by packed weights, for the instructions that are being compiled for (Highway's
// foreach_target).
#if defined(LVLM_LINEAR_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_LINEAR_INL_H
#undef LVLM_LINEAR_INL_H
#else
#define LVLM_LINEAR_INL_H
#endif

#include <algorithm>

#include "attention-inl.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

constexpr size_t kDepth = 1024;     // rows of weights at a time: a panel of them stays in the second-level cache
constexpr size_t kFetchedRows = 8;  // from so many rows on a panel takes longer to compute with than to fetch

// Of weights [depth, columns] the panel [depth, PanelWidth()] that begins in column ``start``. What lies
// beyond the columns is 0.
HWY_INLINE void PackWeights(const float* weights, size_t depth, size_t columns, size_t start, float* to) {
    const size_t panel = PanelWidth(), valid = std::min(panel, columns - start);
    for (size_t k = 0; k < depth; ++k, to += panel) {
        std::copy(weights + k * columns + start, weights + k * columns + start + valid, to);
        std::fill(to + valid, to + panel, 0.0f);
    }
}

// c [R, panel] (+)= a [R, depth] · b [depth, panel]; ``step`` bytes from ``next`` on are fetched in each of
// the ``depth`` steps: 0, one line or two.
template <size_t R>
HWY_INLINE void Rows(const float* HWY_RESTRICT a, size_t a_row, const float* HWY_RESTRICT b, size_t depth,
                     float* HWY_RESTRICT c, size_t c_row, bool add, const char* next, size_t step) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    Vec left[R], right[R];
    for (size_t r = 0; r < R; ++r) {
        left[r] = add ? hn::LoadU(d, c + r * c_row) : hn::Zero(d);
        right[r] = add ? hn::LoadU(d, c + r * c_row + lanes) : hn::Zero(d);
    }
    for (size_t k = 0; k < depth; ++k, b += 2 * lanes, next += step) {
        const Vec one = hn::LoadU(d, b), other = hn::LoadU(d, b + lanes);
        if (step > 0) __builtin_prefetch(next, 0, 2);
        if (step > kLineBytes) __builtin_prefetch(next + kLineBytes, 0, 2);
#pragma GCC unroll 12
        for (size_t r = 0; r < R; ++r) {
            const Vec x = hn::Set(d, a[r * a_row + k]);
            left[r] = hn::MulAdd(x, one, left[r]);
            right[r] = hn::MulAdd(x, other, right[r]);
        }
    }
    for (size_t r = 0; r < R; ++r) {
        hn::StoreU(left[r], d, c + r * c_row);
        hn::StoreU(right[r], d, c + r * c_row + lanes);
    }
}

// The same for 1 to kRows rows.
template <size_t R = kRows>
HWY_INLINE void SomeRows(size_t rows, const float* a, size_t a_row, const float* b, size_t depth, float* c,
                         size_t c_row, bool add, const char* next, size_t step) {
    if constexpr (R > 0) {
        if (rows == R)
            Rows<R>(a, a_row, b, depth, c, c_row, add, next, step);
        else
            SomeRows<R - 1>(rows, a, a_row, b, depth, c, c_row, add, next, step);
    }
}

// The same where only ``valid`` columns of the panel are; ``edge``: room for kRows rows of a panel.
HWY_INLINE void TileRows(const float* a, size_t rows, size_t a_row, const float* b, size_t depth, float* c,
                         size_t c_row, size_t valid, bool add, float* edge, const char* next, size_t step) {
    const size_t panel = PanelWidth();
    if (valid == panel) return SomeRows(rows, a, a_row, b, depth, c, c_row, add, next, step);
    for (size_t r = 0; r < rows && add; ++r)
        std::copy(c + r * c_row, c + r * c_row + valid, edge + r * panel);
    SomeRows(rows, a, a_row, b, depth, edge, panel, add, next, step);
    for (size_t r = 0; r < rows; ++r)
        std::copy(edge + r * panel, edge + r * panel + valid, c + r * c_row);
}

// y [rows, columns] = x [rows, depth] · the columns [first, last) of packed weights; rows of y are
// ``columns`` apart. ``first`` is a multiple of the panel's width, ``last`` too or ``columns``.
HWY_INLINE void MultiplyPanels(const float* x, size_t rows, size_t depth, const float* panels, size_t columns,
                               size_t first, size_t last, float* y) {
    const size_t panel = PanelWidth(), blocks = (rows + kRows - 1) / kRows;
    const size_t bytes = panel * sizeof(float);
    HWY_ALIGN float edge[kRows * kPanelMultiple];  // of a panel beyond the last column
    for (size_t start = first; start < last; start += panel) {
        const size_t valid = std::min(panel, columns - start);
        for (size_t done = 0; done < depth; done += kDepth) {
            const size_t some = std::min(kDepth, depth - done);
            const float* b = panels + start * depth + done * panel;
            // Each of the first blocks fetches a part of what comes next, while it computes: after the last
            // panel another task's, or the weights that were packed next. No address is read by that.
            const char* next = reinterpret_cast<const char*>(b + some * panel);
            size_t step = rows < kFetchedRows ? 0 : std::max(kLineBytes, bytes / blocks);
            size_t left = some * bytes;
            for (size_t block = 0; block < blocks; ++block) {
                const size_t row = rows * block / blocks, count = rows * (block + 1) / blocks - row;
                const float* a = x + row * depth + done;
                float* c = y + row * columns + start;
                if (left < some * step) step = 0;
                TileRows(a, count, depth, b, some, c, columns, valid, done > 0, edge, next, step);
                next += some * step, left -= some * step;
            }
        }
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
