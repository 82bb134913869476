// Weights of 8 bits in blocks: as a graph has them, and packed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lvlm {

constexpr float kUsualZero = 128;  // of weights that say none

// Numbers [columns, depth], scales [columns, depth / block] and zeros likewise or null: those of ONNX Runtime's
// MatMulNBits.
struct BlockWeights {
    size_t depth, columns, block;
    const uint8_t *numbers, *zeros;
    const float* scales;
};

// Panels one after the other, ``floats`` each: scales [depth / block, width], zeros likewise where the weights
// have them, numbers [depth, width] bytes.
struct BlockPanels {
    const float* memory;
    size_t floats, depth, block;
    bool zeroed;
};

}  // namespace lvlm
