// Discarded tokens of an image and the centres that may absorb them; the sums that come of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "merge_choice.h"
#include "op.h"
#include "padded.h"

namespace lvlm {

// One image of one row, of which tokens merge.
template <class T>
struct MergingImage {
    size_t row;
    const T* hidden;  // [N, width], the row's
    size_t width;
    ImageChoice tokens;
    Padded panels;             // the centres
    std::vector<float> norms;  // theirs
};

// A discarded token that a centre may absorb.
struct Absorbable {
    size_t centre;  // which of the image's
    int64_t token;
    float similarity;
};

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();

// Adds to what one centre absorbs. With a limit: the most similar first; of equal ones the first added.
inline void absorb(std::vector<Absorbable>& absorbed, Absorbable more, size_t limit) {
    if (std::isnan(more.similarity)) more.similarity = -std::numeric_limits<float>::infinity();
    if (limit == kNoLimit) return absorbed.push_back(more);
    if (absorbed.size() == limit) {
        if (!(more.similarity > absorbed.back().similarity)) return;
        absorbed.pop_back();
    }
    const auto before = [](const auto& a, const auto& b) { return a.similarity > b.similarity; };
    absorbed.insert(std::upper_bound(absorbed.begin(), absorbed.end(), more, before), more);
}

// A part of a row of the output.
struct WeightedToken {
    int64_t token;
    float weight;
};

// The centres into panels, and their norms.
void pack_centres(MergingImage<float>& image);
void pack_centres(MergingImage<Half>& image);

// Discarded tokens from ``first`` to ``last``, each with the centre that has the highest cosine, equal:
// the more important one. ``shared``, if not 0: for every centre so many, by dot product, instead.
void meet_centres(const MergingImage<float>& image, size_t first, size_t last, size_t shared,
                  std::vector<Absorbable>& found);
void meet_centres(const MergingImage<Half>& image, size_t first, size_t last, size_t shared,
                  std::vector<Absorbable>& found);

// Rows of ``hidden`` [N, width], weighted.
void write_sum(const float* hidden, size_t width, const std::vector<WeightedToken>& parts, float* to);
void write_sum(const Half* hidden, size_t width, const std::vector<WeightedToken>& parts, Half* to);

}  // namespace lvlm
