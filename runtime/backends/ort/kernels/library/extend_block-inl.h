// A block of new tokens attends to entries of a cache and to other new tokens (extend_attention.cpp).
//
// Its queries are columns: keys and values are then read as they lie in the cache, once for all query heads
// of a group, and a softmax is a column.
#ifndef LVLM_EXTEND_BLOCK_ONCE
#define LVLM_EXTEND_BLOCK_ONCE
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "padded.h"

namespace lvlm {

constexpr size_t kColumns = 96;  // of a block at most, unless a group is larger
constexpr size_t kKeys = 144;     // keys at a time: whole register blocks of rows
constexpr float kHidden = -3.4e38f;

// Keys [first, last) of the past, or of the new ones, that a token of a block sees.
struct Piece {
    size_t first, last;
    bool fresh;  // of the new ones
    bool whole;  // every token sees all of them
};

// New tokens of one row, for one key head.
template <class T, class C>
struct Block {
    size_t group, width, tokens;
    size_t columns;  // tokens of one head after those of another; padded
    float scale;
    const T *query, *key, *value;  // of its first token, the next one ``stride`` further
    size_t stride;
    const T *cos, *sin;            // [tokens, width / 2]
    float* queries;                // panels of columns
    float *own_keys, *own_values;  // [tokens, width]
    C *key_slots, *value_slots;
    const C *past_keys, *past_values;
    const int64_t* slots;                // of the past; null: one after the other
    const float *new_keys, *new_values;  // of all blocks of the row
    const uint8_t* mask;                 // [tokens, past and new keys], ``seen`` a row
    size_t past, seen;
    std::vector<Piece> pieces;
    size_t parts;
    float *sums, *most, *total;  // of each part: [tokens * group, width], [columns] and [columns]
    T* output;                   // of its first token, the next one ``next`` further
    size_t next;
};

enum class Stage { kEnter, kAttend, kJoin };

}  // namespace lvlm
#endif

#if defined(LVLM_EXTEND_BLOCK_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LVLM_EXTEND_BLOCK_INL_H
#undef LVLM_EXTEND_BLOCK_INL_H
#else
#define LVLM_EXTEND_BLOCK_INL_H
#endif

#include "entries-inl.h"
#include "rotary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class T, class C>
void Enter(const Block<T, C>& block) {
    const size_t panel = PanelWidth(), width = block.width, entry = entry_width<C>(width);
    Padded turned(width);
    std::fill(block.queries, block.queries + block.columns * width, 0.0f);
    for (size_t t = 0; t < block.tokens; ++t) {
        const T *cos = block.cos + t * width / 2, *sin = block.sin + t * width / 2;
        float *key = block.own_keys + t * width, *value = block.own_values + t * width;
        Turn(Turned<T>{block.key + t * block.stride, cos, sin, width, 1}, key);
        CopyScaled(block.value + t * block.stride, width, 1, value);
        StoreEntry(key, width, block.key_slots + t * entry);
        StoreEntry(value, width, block.value_slots + t * entry);
        for (size_t g = 0; g < block.group; ++g) {
            const T* query = block.query + t * block.stride + g * width;
            Turn(Turned<T>{query, cos, sin, width, block.scale}, turned.data());
            const size_t column = g * block.tokens + t;
            float* to = block.queries + column / panel * panel * width + column % panel;
            for (size_t i = 0; i < width; ++i) to[i * panel] = turned.data()[i];
        }
    }
}

// As Tile, of any number of rows.
template <size_t V>
void Tiles(const float* a, size_t a_row, size_t a_step, const float* b, size_t b_row, size_t depth,
           float* c, size_t c_row, size_t rows, bool add) {
    constexpr size_t few = kRows / 3;
    size_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        Tile<kRows, V>(a + r * a_row, a_row, a_step, b, b_row, depth, c + r * c_row, c_row, add);
    for (; r + few <= rows; r += few)
        Tile<few, V>(a + r * a_row, a_row, a_step, b, b_row, depth, c + r * c_row, c_row, add);
    for (; r < rows; ++r)
        Tile<1, V>(a + r * a_row, a_row, a_step, b, b_row, depth, c + r * c_row, c_row, add);
}

// Logits of one column of vectors become weights, exp(logit - most); what was summed before has to be
// multiplied by ``factor``. What is not finite makes the sum NaN.
inline void Soften(float* logits, size_t count, size_t stride, float* most, float* total, float* factor) {
    const F32 d;
    const Vec before = hn::LoadU(d, most);
    Vec now = before, sum = hn::Zero(d);
    for (size_t j = 0; j < count; ++j) now = hn::Max(now, hn::LoadU(d, logits + j * stride));
    for (size_t j = 0; j < count; ++j) {
        const Vec logit = hn::LoadU(d, logits + j * stride);
        const Vec weight = hn::Exp(d, hn::Sub(logit, now));
        hn::StoreU(weight, d, logits + j * stride);
        sum = hn::Add(sum, hn::MulAdd(logit, hn::Zero(d), weight));
    }
    const Vec by = hn::Exp(d, hn::Sub(before, now));
    hn::StoreU(now, d, most);
    hn::StoreU(by, d, factor);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, total), by, sum), d, total);
}

// Entries of the past in fp32: as they lie there, or copied to ``to``.
template <class C>
const float* Past(const C* from, const int64_t* slots, size_t width, const Piece& piece, float* to) {
    if constexpr (std::is_same_v<C, float>)
        if (slots == nullptr) return from + piece.first * width;
    for (size_t j = piece.first; j < piece.last; ++j)
        LoadEntry(from + (slots == nullptr ? j : slots[j]) * entry_width<C>(width), width,
                  to + (j - piece.first) * width);
    return to;
}

// One pass over the keys and values of a part.
template <class T, class C>
void Attend(const Block<T, C>& block, size_t part) {
    const size_t lanes = hn::Lanes(F32()), panel = PanelWidth(), width = block.width;
    const size_t columns = block.columns, used = block.tokens * block.group;
    Padded logits(kKeys * columns), factors(columns), copies(2 * kKeys * width);
    float *sums = block.sums + part * used * width, *most = block.most + part * columns;
    float* total = block.total + part * columns;
    std::fill(most, most + columns, kHidden);
    std::fill(total, total + columns, 0.0f);
    const size_t first = part * block.pieces.size() / block.parts;
    const size_t last = (part + 1) * block.pieces.size() / block.parts;
    if (first == last) std::fill(sums, sums + used * width, 0.0f);  // nothing is seen
    for (size_t i = first; i < last; ++i) {
        const Piece& piece = block.pieces[i];
        const size_t count = piece.last - piece.first, at = piece.first * width;
        const float *keys = block.new_keys + at, *values = block.new_values + at;
        if (!piece.fresh) {
            keys = Past(block.past_keys, block.slots, width, piece, copies.data());
            values = Past(block.past_values, block.slots, width, piece, copies.data() + kKeys * width);
        }
        for (size_t c = 0; c < used; c += panel) {
            const auto tiles = used - c > lanes ? Tiles<2> : Tiles<1>;
            tiles(keys, width, 1, block.queries + c * width, panel, width, logits.data() + c, columns,
                  count, false);
        }
        if (!piece.whole)
            for (size_t t = 0; t < block.tokens; ++t) {
                const uint8_t* sees = block.mask + t * block.seen + piece.first;
                if (piece.fresh) sees += block.past;
                for (size_t j = 0; j < count; ++j)
                    for (size_t g = 0; sees[j] == 0 && g < block.group; ++g)
                        logits.data()[j * columns + g * block.tokens + t] = kHidden;
            }
        for (size_t c = 0; c < used; c += lanes)
            Soften(logits.data() + c, count, columns, most + c, total + c, factors.data() + c);
        for (size_t r = 0; i > first && r < used; ++r)
            if (factors.data()[r] != 1)
                CopyScaled(sums + r * width, width, factors.data()[r], sums + r * width);
        for (size_t c = 0; c < width;) {
            const bool wide = c + panel <= width;
            const auto tiles = wide ? Tiles<2> : Tiles<1>;
            tiles(logits.data(), 1, columns, values + c, width, count, sums + c, width, used, i > first);
            c += wide ? panel : lanes;
        }
    }
}

// The parts of a block are one softmax.
template <class T, class C>
void Join(const Block<T, C>& block) {
    const F32 d;
    const size_t width = block.width, used = block.tokens * block.group;
    Padded row(width);
    for (size_t r = 0; r < used; ++r) {
        float most = kHidden, total = 0;
        for (size_t part = 0; part < block.parts; ++part)
            most = std::max(most, block.most[part * block.columns + r]);
        std::fill(row.data(), row.data() + width, 0.0f);
        for (size_t part = 0; part < block.parts; ++part) {
            const float factor = std::exp(block.most[part * block.columns + r] - most);
            total += factor * block.total[part * block.columns + r];
            const float* sums = block.sums + (part * used + r) * width;
            for (size_t i = 0; i < width; i += hn::Lanes(d))
                Store(hn::MulAdd(hn::Set(d, factor), Load(sums + i), Load(row.data() + i)), row.data() + i);
        }
        T* to = block.output + r % block.tokens * block.next + r / block.tokens * width;
        CopyScaledOut(row.data(), width, total == 0 ? 0 : 1 / total, to);
    }
}

template <class T, class C>
void RunStage(const Block<T, C>& block, Stage stage, size_t part) {
    if (stage == Stage::kEnter) return Enter(block);
    if (stage == Stage::kAttend) return Attend(block, part);
    Join(block);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();
#endif
