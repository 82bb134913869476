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

// Panels one after the other, ``floats`` each: scales [depth / block, width], zeros likewise where the weights
// have them, numbers [depth * bits / 8, width] bytes.
struct BlockPanels {
    const float* memory;
    size_t floats, depth, block;
    bool zeroed;
    float usual_zero;  // where they have none
};

}  // namespace lvlm
