// Packed weights, one copy for all sessions that read the same ones.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "padded.h"

namespace lvlm {

using PackedWeights = std::shared_ptr<const float>;

// What is packed: where it lies, into how many panels of so many floats each, and for what.
struct PackedKey {
    const void* weights;
    size_t panels, panel;
    const char* purpose;
};

// Writes the panel ``index``, every float of it.
using PackPanel = std::function<void(size_t index, float* panel)>;

// What ``pack`` makes of weights, one panel at a time: made for the first to ask and shared by all others
// who have the same weights at the same address. They are compared, since those of a session that is being
// destroyed may be gone before what is packed is, and others have come to lie there.
PackedWeights packed_weights(const PackedKey& key, const PackPanel& pack);

// The same for one call alone.
PackedWeights packed_for_now(const PackedKey& key, const PackPanel& pack);

}  // namespace lvlm
