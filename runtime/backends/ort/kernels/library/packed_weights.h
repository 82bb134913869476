// Packed weights, one copy for all sessions that read the same ones.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace lvlm {

using PackedWeights = std::shared_ptr<const float>;

struct PackedSizes {
    size_t depth, columns;  // padded
    bool transposed;
    size_t floats() const { return depth * columns; }
    bool operator==(const PackedSizes& other) const {
        return depth == other.depth && columns == other.columns && transposed == other.transposed;
    }
};

// What ``pack`` makes of ``weights``: made for the first to ask, shared by all others. The weights must stay
// where they are as long as anybody holds it.
PackedWeights packed_weights(const float* weights, PackedSizes sizes,
                             const std::function<void(float*)>& pack);

}  // namespace lvlm
