// Tokens and centres, a run of tokens at a time (token_meeting.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "token_meeting.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "attention-inl.h"
#include "token_meeting.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

// At least the least that the contract divides by.
inline float Norm(const float* state, size_t width) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    Vec squares = hn::Zero(d);
    size_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        const Vec x = hn::LoadU(d, state + i);
        squares = hn::MulAdd(x, x, squares);
    }
    float sum = hn::GetLane(hn::SumOfLanes(d, squares));
    for (; i < width; ++i) sum += state[i] * state[i];
    return std::max(std::sqrt(sum), 1e-12f);
}

template <class T>
void PackCentres(MergingImage<T>& image) {
    const std::vector<int64_t>& centres = image.tokens.centres;
    const size_t width = image.width;
    PackKeys(image.hidden, centres.data(), centres.size(), width, 0, padded_extent(centres.size()),
             image.panels.data());
    Padded state(width);
    for (const int64_t centre : centres) {
        CopyScaled(image.hidden + centre * width, width, 1, state.data());
        image.norms.push_back(Norm(state.data(), width));
    }
}

template <class T>
void MeetCentres(const MergingImage<T>& image, size_t first, size_t last, size_t shared,
                 std::vector<Absorbable>& found) {
    const size_t width = image.width, centres = image.tokens.centres.size();
    const size_t stride = padded_extent(centres);
    Padded states(kRows * width), products(kRows * stride);
    std::vector<std::vector<Absorbable>> taken(shared > 0 ? centres : 0);
    for (size_t start = first; start < last; start += kRows) {
        const size_t count = std::min(kRows, last - start);
        const int64_t* tokens = image.tokens.discarded.data() + start;
        for (size_t r = 0; r < count; ++r)
            CopyScaled(image.hidden + tokens[r] * width, width, 1, states.data() + r * width);
        std::fill(states.data() + count * width, states.data() + kRows * width, 0.0f);
        for (size_t c = 0; c < centres; c += PanelWidth())
            Product(states.data(), width, image.panels.data() + c * width, width, products.data() + c,
                    stride, false);
        for (size_t r = 0; r < count; ++r) {
            float* row = products.data() + r * stride;
            for (size_t c = 0; c < taken.size(); ++c) absorb(taken[c], {c, tokens[r], row[c]}, shared);
            if (shared > 0) continue;
            const float norm = Norm(states.data() + r * width, width);
            for (size_t c = 0; c < centres; ++c) row[c] = row[c] / image.norms[c] / norm;
            const size_t nearest = std::max_element(row, row + centres) - row;
            found.push_back({nearest, tokens[r], row[nearest]});
        }
    }
    for (const auto& some : taken) found.insert(found.end(), some.begin(), some.end());
}

template <class T>
void WriteSum(const T* hidden, size_t width, const std::vector<WeightedToken>& parts, T* to) {
    const F32 d;
    const size_t lanes = hn::Lanes(d);
    size_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        Vec sum = hn::Zero(d);
        for (const auto& [token, weight] : parts)
            sum = hn::MulAdd(hn::Set(d, weight), Load(hidden + token * width + i), sum);
        Store(sum, to + i);
    }
    for (; i < width; ++i) {
        float sum = 0;
        for (const auto& [token, weight] : parts) sum += weight * Widened(hidden[token * width + i]);
        Narrow(sum, to + i);
    }
}

using Parts = std::vector<WeightedToken>;
using Found = std::vector<Absorbable>;
void PackFloat(MergingImage<float>& i) { PackCentres(i); }
void PackHalf(MergingImage<Half>& i) { PackCentres(i); }
void MeetFloat(const MergingImage<float>& i, size_t first, size_t last, size_t shared, Found& found) {
    MeetCentres(i, first, last, shared, found);
}
void MeetHalf(const MergingImage<Half>& i, size_t first, size_t last, size_t shared, Found& found) {
    MeetCentres(i, first, last, shared, found);
}
void SumFloat(const float* h, size_t width, const Parts& p, float* to) { WriteSum(h, width, p, to); }
void SumHalf(const Half* h, size_t width, const Parts& p, Half* to) { WriteSum(h, width, p, to); }

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(PackFloat);
HWY_EXPORT(PackHalf);
HWY_EXPORT(MeetFloat);
HWY_EXPORT(MeetHalf);
HWY_EXPORT(SumFloat);
HWY_EXPORT(SumHalf);

}  // namespace

void pack_centres(MergingImage<float>& image) { HWY_DYNAMIC_DISPATCH(PackFloat)(image); }
void pack_centres(MergingImage<Half>& image) { HWY_DYNAMIC_DISPATCH(PackHalf)(image); }

void meet_centres(const MergingImage<float>& image, size_t first, size_t last, size_t shared,
                  std::vector<Absorbable>& found) {
    HWY_DYNAMIC_DISPATCH(MeetFloat)(image, first, last, shared, found);
}
void meet_centres(const MergingImage<Half>& image, size_t first, size_t last, size_t shared,
                  std::vector<Absorbable>& found) {
    HWY_DYNAMIC_DISPATCH(MeetHalf)(image, first, last, shared, found);
}

void write_sum(const float* hidden, size_t width, const std::vector<WeightedToken>& parts, float* to) {
    HWY_DYNAMIC_DISPATCH(SumFloat)(hidden, width, parts, to);
}
void write_sum(const Half* hidden, size_t width, const std::vector<WeightedToken>& parts, Half* to) {
    HWY_DYNAMIC_DISPATCH(SumHalf)(hidden, width, parts, to);
}

}  // namespace lvlm
#endif
