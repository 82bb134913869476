// A linear layer by packed weights of 8 bits in blocks, for the instructions that are being compiled for
// (Highway's foreach_target).
#if defined(LVLM_BLOCK_LINEAR_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_BLOCK_LINEAR_INL_H
#undef LVLM_BLOCK_LINEAR_INL_H
#else
#define LVLM_BLOCK_LINEAR_INL_H
#endif

#include <algorithm>

#include "block_weights.h"
#include "linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

// Of weights the panel that begins in column ``start`` (BlockPanels), of ``floats`` floats in all. What lies
// beyond the columns is 0.
HWY_INLINE void PackBlocks(const BlockWeights& from, size_t start, float* to, size_t floats) {
    const size_t panel = PanelWidth(), depth = from.depth, blocks = depth / from.block;
    std::fill(to, to + floats, 0.0f);
    float* zeros = to + blocks * panel;
    auto* numbers = reinterpret_cast<uint8_t*>(from.zeros ? zeros + blocks * panel : zeros);
    for (size_t at = 0; at < panel && start + at < from.columns; ++at) {
        const size_t column = start + at;
        for (size_t k = 0; k < depth; ++k) numbers[k * panel + at] = from.numbers[column * depth + k];
        for (size_t b = 0; b < blocks; ++b) {
            to[b * panel + at] = from.scales[column * blocks + b];
            if (from.zeros) zeros[b * panel + at] = from.zeros[column * blocks + b];
        }
    }
}

HWY_INLINE Vec Numbers(const uint8_t* from) {
    const F32 d;
    const hn::Rebind<uint8_t, F32> bytes;
    const hn::Rebind<int32_t, F32> whole;
    return hn::ConvertTo(d, hn::PromoteTo(whole, hn::LoadU(bytes, from)));
}

// Calls ``each(k, left, right)`` for the numbers, less their zeros, of rows [first, last) of a panel, which
// lie in one block.
template <class Each>
HWY_INLINE void EachNumber(const uint8_t* numbers, Vec left_zero, Vec right_zero, size_t first, size_t last,
                           Each&& each) {
    const size_t panel = PanelWidth(), lanes = panel / 2;
    const uint8_t* from = numbers + first * panel;
    for (size_t k = first; k < last; ++k, from += panel)
        each(k, hn::Sub(Numbers(from), left_zero), hn::Sub(Numbers(from + lanes), right_zero));
}

// One panel, and the zeros and scales of one of its blocks.
struct OnePanel {
    const float *scales, *zeros;  // zeros: null where all are kUsualZero
    const uint8_t* numbers;

    OnePanel(const BlockPanels& all, size_t index) {
        const size_t some = all.depth / all.block * PanelWidth();
        scales = all.memory + index * all.floats;
        zeros = all.zeroed ? scales + some : nullptr;
        numbers = reinterpret_cast<const uint8_t*>(scales + some * (all.zeroed ? 2 : 1));
    }

    HWY_INLINE Vec scale(size_t block, size_t half) const { return at(scales, block, half); }
    HWY_INLINE Vec zero(size_t block, size_t half) const {
        return zeros ? at(zeros, block, half) : hn::Set(F32(), kUsualZero);
    }

private:
    static HWY_INLINE Vec at(const float* from, size_t block, size_t half) {
        return hn::LoadU(F32(), from + block * PanelWidth() + half * hn::Lanes(F32()));
    }
};

// to [last - first, panel] = rows [first, last) of a panel
HWY_INLINE void Dequantize(const OnePanel& panel, size_t block, size_t first, size_t last, float* to) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    for (size_t k = first; k < last;) {
        const size_t which = k / block, end = std::min(last, (which + 1) * block);
        const Vec left_scale = panel.scale(which, 0), right_scale = panel.scale(which, 1);
        EachNumber(panel.numbers, panel.zero(which, 0), panel.zero(which, 1), k, end,
                         [&](size_t, Vec left, Vec right) HWY_ATTR {
                             hn::StoreU(hn::Mul(left, left_scale), d, to);
                             hn::StoreU(hn::Mul(right, right_scale), d, to + lanes);
                             to += 2 * lanes;
                         });
        k = end;
    }
}

// c [R, panel] = a [R, depth] · a panel
template <size_t R>
HWY_INLINE void BlockRows(const float* a, size_t depth, const OnePanel& panel, size_t block, float* c,
                          size_t c_row) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    Vec left[R], right[R];
    for (size_t r = 0; r < R; ++r) left[r] = right[r] = hn::Zero(d);
    for (size_t which = 0; which < depth / block; ++which) {
        Vec some_left[R], some_right[R];
        for (size_t r = 0; r < R; ++r) some_left[r] = some_right[r] = hn::Zero(d);
        EachNumber(panel.numbers, panel.zero(which, 0), panel.zero(which, 1), which * block,
                         (which + 1) * block, [&](size_t k, Vec one, Vec other) HWY_ATTR {
#pragma GCC unroll 12
                             for (size_t r = 0; r < R; ++r) {
                                 const Vec x = hn::Set(d, a[r * depth + k]);
                                 some_left[r] = hn::MulAdd(x, one, some_left[r]);
                                 some_right[r] = hn::MulAdd(x, other, some_right[r]);
                             }
                         });
        for (size_t r = 0; r < R; ++r) {
            left[r] = hn::MulAdd(some_left[r], panel.scale(which, 0), left[r]);
            right[r] = hn::MulAdd(some_right[r], panel.scale(which, 1), right[r]);
        }
    }
    for (size_t r = 0; r < R; ++r) {
        hn::StoreU(left[r], d, c + r * c_row);
        hn::StoreU(right[r], d, c + r * c_row + lanes);
    }
}

// Rows that are multiplied as the numbers come; more of them by what the numbers stand for, made once.
#if HWY_TARGET == HWY_AVX2
constexpr size_t kDirect = 3;
#else
constexpr size_t kDirect = 6;
#endif

template <size_t R = kDirect>
HWY_INLINE void SomeBlockRows(size_t rows, const float* a, size_t depth, const OnePanel& panel, size_t block,
                              float* c, size_t c_row) {
    if constexpr (R > 0) {
        if (rows == R)
            BlockRows<R>(a, depth, panel, block, c, c_row);
        else
            SomeBlockRows<R - 1>(rows, a, depth, panel, block, c, c_row);
    }
}

// y [rows, columns] = x [rows, depth] · the columns [first, last) of the panels; rows of y are ``columns``
// apart. ``room``: kDepth rows of a panel, where there are more rows than kDirect.
HWY_INLINE void MultiplyBlocks(const float* x, size_t rows, const BlockPanels& panels, size_t columns,
                               size_t first, size_t last, float* room, float* y) {
    const size_t depth = panels.depth, width = PanelWidth(), tiles = (rows + kRows - 1) / kRows;
    HWY_ALIGN float edge[kRows * kPanelMultiple];  // of a panel beyond the last column
    for (size_t start = first; start < last; start += width) {
        const OnePanel panel(panels, start / width);
        const size_t valid = std::min(width, columns - start);
        if (rows <= kDirect) {
            float* c = valid == width ? y + start : edge;
            SomeBlockRows(rows, x, depth, panel, panels.block, c, valid == width ? columns : width);
            for (size_t r = 0; r < rows && valid < width; ++r)
                std::copy(edge + r * width, edge + r * width + valid, y + r * columns + start);
            continue;
        }
        for (size_t done = 0; done < depth; done += kDepth) {
            const size_t some = std::min(kDepth, depth - done);
            Dequantize(panel, panels.block, done, done + some, room);
            for (size_t tile = 0; tile < tiles; ++tile) {
                const size_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
                TileRows(x + row * depth + done, count, depth, room, some, y + row * columns + start, columns,
                         valid, done > 0, edge, nullptr, 0);
            }
        }
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
