// lvlm.lowered::BlockLinear and ZeroedBlockLinear: a linear layer in fp32 by weights of 8 or 4 bits in blocks,
// without and with zero points. Inputs are those of MatMulNBits, whose place it takes; nothing is rounded.
//
// Weights are packed as linear.cpp has them. A few rows are multiplied by the numbers as they come, and each
// block's sum by its scale; for more rows what they stand for is made once, a panel at a time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "block_linear.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "block_linear-inl.h"
#include "linear_tasks.h"
#include "packed_weights.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

size_t BlockPanel() { return PanelWidth(); }
size_t BlockRoom() { return kDepth * PanelWidth(); }
void BlockPack(size_t bits, const BlockWeights& from, size_t start, float* panel, size_t floats) {
    bits == 8 ? PackBlocks<8>(from, start, panel, floats) : PackBlocks<4>(from, start, panel, floats);
}
void BlockMultiply(size_t bits, const float* x, size_t rows, const BlockPanels& panels, size_t columns,
                   size_t first, size_t last, float* room, float* y) {
    if (bits == 8)
        MultiplyBlocks<8>(x, rows, panels, columns, first, last, room, y);
    else
        MultiplyBlocks<4>(x, rows, panels, columns, first, last, room, y);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(BlockPanel);
HWY_EXPORT(BlockRoom);
HWY_EXPORT(BlockPack);
HWY_EXPORT(BlockMultiply);

template <bool zeroed>
class BlockLinear {
public:
    static constexpr const char* kName = zeroed ? "ZeroedBlockLinear" : "BlockLinear";
    static constexpr const char* kDomain = "lvlm.lowered";
    static constexpr Port kInputs[] = {{Element::kFloat}, {Element::kByte}, {Element::kFloat}, {Element::kByte, !zeroed}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit BlockLinear(const Attributes& attributes)
        : bits_(attributes.integer("bits", 4)), depth_(attributes.integer("K", 0)),
          columns_(attributes.integer("N", 0)), block_(attributes.integer("block_size", 0)),
          panel_(HWY_DYNAMIC_DISPATCH(BlockPanel)()) {
        require((bits_ == 4 || bits_ == 8) && block_ > 0 && depth_ > 0 && columns_ > 0 &&
                    depth_ % block_ == 0 && block_ % 2 == 0,
                "weights are of 4 or 8 bits in blocks of an even size that divides their depth");
        const auto numbers = attributes.constant<uint8_t>(1), zeros = zeroed ? attributes.constant<uint8_t>(3)
                                                                            : Tensor<const uint8_t>();
        const auto scales = attributes.constant<float>(2);
        if (!numbers || !scales || (zeroed && !zeros)) return;
        packed_ = packed_weights(key_of(numbers), packing(numbers, scales, zeros));
    }

    void operator()(Call& call) const {
        const LinearInput input(call, depth_);
        const auto y = input.output(call, columns_);
        PackedWeights packed = packed_;
        if (packed == nullptr) {
            const auto numbers = call.input<uint8_t>(1);
            const auto zeros = zeroed ? call.input<uint8_t>(3) : Tensor<const uint8_t>();
            packed = packed_for_now(key_of(numbers), packing(numbers, call.input<float>(2), zeros));
        }
        const float usual = bits_ == 8 ? 128 : 8;
        const BlockPanels panels{packed.get(), floats(), depth_, block_, zeroed, usual};
        const size_t room = HWY_DYNAMIC_DISPATCH(BlockRoom)();
        share_linear(call, input.rows, depth_, columns_, panel_,
                     [&](size_t row, size_t rows, size_t first, size_t last) {
                         Padded own(room);
                         HWY_DYNAMIC_DISPATCH(BlockMultiply)
                         (bits_, input.x.data + row * depth_, rows, panels, columns_, first, last, own.data(),
                          y.data + row * columns_);
                     });
    }

private:
    size_t blocks() const { return depth_ / block_; }
    // Of a panel; four numbers of 8 bits take the room of one.
    size_t floats() const { return panel_ * (blocks() * (1 + zeroed) + (depth_ * bits_ / 8 + 3) / 4); }
    PackedKey key_of(const Tensor<const uint8_t>& numbers) const {
        return {numbers.data, (columns_ + panel_ - 1) / panel_, floats(), kName};
    }
    PackPanel packing(const Tensor<const uint8_t>& numbers, const Tensor<const float>& scales,
                      const Tensor<const uint8_t>& zeros) const {
        const size_t zero_bytes = (blocks() * bits_ + 7) / 8;
        require(count(numbers) == columns_ * depth_ * bits_ / 8 && count(scales) == columns_ * blocks() &&
                    (!zeroed || count(zeros) == columns_ * zero_bytes),
                "numbers, scales and zero points do not fit");
        const BlockWeights from{depth_, columns_, block_, numbers.data, zeros.data, scales.data};
        return [from, bits = bits_, panel = panel_, floats = floats()](size_t index, float* to) {
            HWY_DYNAMIC_DISPATCH(BlockPack)(bits, from, index * panel, to, floats);
        };
    }
    template <class T>
    static size_t count(const Tensor<T>& tensor) {
        size_t found = 1;
        for (const int64_t extent : tensor.shape) found *= extent;
        return found;
    }

    size_t bits_, depth_, columns_, block_, panel_;
    PackedWeights packed_;
};

const Registered<BlockLinear<false>, BlockLinear<true>> registered;

}  // namespace
}  // namespace lvlm
#endif
