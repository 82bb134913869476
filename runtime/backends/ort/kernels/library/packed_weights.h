// Packed weights, one copy for all sessions that read the same ones.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace lvlm {

using PackedWeights = std::shared_ptr<const float>;

// What is packed: where it lies, into how many floats, and for what.
struct PackedKey {
    const void* weights;
    size_t floats;
    const char* purpose;
};

// What ``pack`` makes of weights: made for the first to ask, shared by all others. The weights must stay
// where they are as long as anybody holds it.
PackedWeights packed_weights(const PackedKey& key, const std::function<void(float*)>& pack);

}  // namespace lvlm
