// The choice of one row in TokenMerge: which tokens stay, and who may absorb the others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "op.h"

namespace lvlm {

// The tokens of one image that merge.
struct ImageChoice {
    std::vector<int64_t> centres;    // the most important first
    std::vector<int64_t> discarded;  // rising
};

struct RowChoice {
    std::vector<int64_t> stay;        // rising
    std::vector<ImageChoice> images;  // those that have centres and discarded tokens
};

// ``importance`` and ``image_id`` [length]; ``keep`` and ``centres`` [images], where of those that are kept
// the last ``centres`` are, with null all.
inline RowChoice choose_tokens(const float* importance, const int64_t* image_id, int64_t length,
                               const int64_t* keep, const int64_t* centres, int64_t images) {
    std::vector<std::vector<int64_t>> members(images);
    int64_t last = -1;  // the last valid token
    RowChoice choice;
    for (int64_t i = 0; i < length; ++i) {
        if (image_id[i] >= 0) last = i;
        if (image_id[i] == 0) choice.stay.push_back(i);
        if (image_id[i] > 0 && image_id[i] <= images) members[image_id[i] - 1].push_back(i);
    }
    const auto score = [&](int64_t i) {
        constexpr float infinity = std::numeric_limits<float>::infinity();
        return i == last ? infinity : std::isnan(importance[i]) ? -infinity : importance[i];
    };
    const auto before = [&](int64_t a, int64_t b) {
        const float x = score(a), y = score(b);
        return x != y ? x > y : a < b;
    };
    for (int64_t m = 0; m < images; ++m) {
        std::vector<int64_t>& tokens = members[m];
        require(keep[m] >= 0 && keep[m] <= static_cast<int64_t>(tokens.size()),
                "keep exceeds the image tokens that are present");
        require(centres == nullptr || (centres[m] >= 0 && centres[m] <= keep[m]), "recycle exceeds keep");
        const auto kept = tokens.begin() + keep[m];
        std::partial_sort(tokens.begin(), kept, tokens.end(), before);
        choice.stay.insert(choice.stay.end(), tokens.begin(), kept);
        const auto first = centres == nullptr ? tokens.begin() : kept - centres[m];
        if (first == kept || kept == tokens.end()) continue;
        choice.images.push_back({{first, kept}, {kept, tokens.end()}});
        std::sort(choice.images.back().discarded.begin(), choice.images.back().discarded.end());
    }
    std::sort(choice.stay.begin(), choice.stay.end());
    return choice;
}

}  // namespace lvlm
