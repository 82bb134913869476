// lvlm.lowered::BlockLinear and ZeroedBlockLinear: a linear layer in fp32 by weights of 8 bits in blocks,
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
size_t BlockRoom(size_t rows) { return rows > kDirect ? kDepth * PanelWidth() : 0; }
void BlockPack(const BlockWeights& from, size_t start, float* panel, size_t floats) {
    PackBlocks(from, start, panel, floats);
}
void BlockMultiply(const float* x, size_t rows, const BlockPanels& panels, size_t columns, size_t first,
                   size_t last, float* room, float* y) {
    MultiplyBlocks(x, rows, panels, columns, first, last, room, y);
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
        : depth_(attributes.integer("K", 0)), columns_(attributes.integer("N", 0)),
          block_(attributes.integer("block_size", 0)), panel_(HWY_DYNAMIC_DISPATCH(BlockPanel)()) {
        require(attributes.integer("bits", 0) == 8 && block_ > 0 && depth_ > 0 && columns_ > 0 &&
                    depth_ % block_ == 0,
                "weights are of 8 bits in blocks of a size that divides their depth");
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
        const BlockPanels panels{packed.get(), floats(), depth_, block_, zeroed};
        share_linear(call, input.rows, depth_, columns_, panel_,
                     [&](size_t row, size_t rows, size_t first, size_t last) {
                         Padded room(HWY_DYNAMIC_DISPATCH(BlockRoom)(rows));
                         HWY_DYNAMIC_DISPATCH(BlockMultiply)
                         (input.x.data + row * depth_, rows, panels, columns_, first, last, room.data(),
                          y.data + row * columns_);
                     });
    }

private:
    size_t blocks() const { return depth_ / block_; }
    // Of a panel; four numbers take the room of one.
    size_t floats() const { return panel_ * (blocks() * (1 + zeroed) + (depth_ + 3) / 4); }
    PackedKey key_of(const Tensor<const uint8_t>& numbers) const {
        return {numbers.data, (columns_ + panel_ - 1) / panel_, floats(), kName};
    }
    PackPanel packing(const Tensor<const uint8_t>& numbers, const Tensor<const float>& scales,
                      const Tensor<const uint8_t>& zeros) const {
        require(count(numbers) == columns_ * depth_ && count(scales) == columns_ * blocks() &&
                    (!zeroed || count(zeros) == columns_ * blocks()),
                "numbers, scales and zero points do not fit");
        const BlockWeights from{depth_, columns_, block_, numbers.data, zeros.data, scales.data};
        return [from, panel = panel_, floats = floats()](size_t index, float* to) {
            HWY_DYNAMIC_DISPATCH(BlockPack)(from, index * panel, to, floats);
        };
    }
    template <class T>
    static size_t count(const Tensor<T>& tensor) {
        size_t found = 1;
        for (const int64_t extent : tensor.shape) found *= extent;
        return found;
    }

    size_t depth_, columns_, block_, panel_;
    PackedWeights packed_;
};

const Registered<BlockLinear<false>, BlockLinear<true>> registered;

}  // namespace
}  // namespace lvlm
#endif
