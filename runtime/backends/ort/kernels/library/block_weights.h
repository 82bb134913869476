// Weights of 8 or 4 bits in blocks: as a graph has them, and packed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lvlm {

// Numbers [columns, depth * bits / 8], scales [columns, depth / block] and, packed like numbers, zeros [columns,
// depth / block] or null: MatMulNBits of ONNX Runtime.
struct BlockWeights {
    size_t depth, columns, block;
    const uint8_t *numbers, *zeros;
    const float* scales;
};

// Panels of numbers [depth * bits / 8, panel], scales and zeros [depth / block, panel], one after the other.
struct BlockPanels {
    size_t columns, block;  // columns: padded
    uint8_t* numbers;
    float *scales, *zeros;  // zeros: null for ``usual_zero``
    float usual_zero;
};

}  // namespace lvlm
