// Packed weights, one copy for all sessions that read the same ones.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace lvlm {

using PackedWeights = std::shared_ptr<const float>;

// Weights in panels: all of one are as many floats as ``panel``.
struct PackedSizes {
    size_t panels, panel;
    bool transposed;
};

// What ``pack`` makes of ``weights``, one panel at a time: made for the first to ask and shared by all others
// who have the same weights at the same address. They are compared, since those of a session that is being
// destroyed may be gone before what is packed is, and others have come to lie there.
PackedWeights packed_weights(const float* weights, PackedSizes sizes,
                             const std::function<void(size_t index, float* panel)>& pack);

}  // namespace lvlm
