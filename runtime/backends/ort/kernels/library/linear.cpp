// lvlm.lowered::Linear and TransposedLinear: a linear layer without bias in fp32, weights [depth, columns]
// and [columns, depth].
//
// Weights are packed once, where they are constant, and by address: sessions that read the same weights
// share what is packed. Tasks are divided by sizes alone, and each element of the result is summed in one
// order, so that results do not depend on threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "linear.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "linear-inl.h"
#include "linear_tasks.h"
#include "packed_weights.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

size_t LinearPanel() { return PanelWidth(); }
void LinearPack(const float* weights, size_t depth, size_t columns, size_t start, float* panel) {
    PackWeights(weights, depth, columns, start, panel);
}
void LinearPackTransposed(const float* weights, size_t depth, size_t columns, size_t start, float* panel) {
    PackKeys(weights + start * depth, nullptr, columns - start, depth, 0, PanelWidth(), panel);
}
void LinearMultiply(const float* x, size_t rows, size_t depth, const float* panels, size_t columns,
                    size_t first, size_t last, float* y) {
    MultiplyPanels(x, rows, depth, panels, columns, first, last, y);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(LinearPanel);
HWY_EXPORT(LinearPack);
HWY_EXPORT(LinearPackTransposed);
HWY_EXPORT(LinearMultiply);

template <bool transposed>
class Linear {
public:
    static constexpr const char* kName = transposed ? "TransposedLinear" : "Linear";
    static constexpr const char* kDomain = "lvlm.lowered";
    static constexpr Port kInputs[] = {{Element::kFloat}, {Element::kFloat}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit Linear(const Attributes& attributes) {
        const auto weights = attributes.constant<float>(1);
        if (!weights || weights.shape.size() != 2) return;
        packed_ = packed_weights(key_of(weights), packing(weights));
    }

    void operator()(Call& call) const {
        const auto weights = call.input<float>(1, 2);
        const Sizes sizes(weights);
        const LinearInput input(call, sizes.depth);
        const auto y = input.output(call, sizes.columns);
        if (sizes.depth == 0) std::fill(y.data, y.data + input.rows * sizes.columns, 0.0f);
        if (input.rows == 0 || sizes.columns == 0 || sizes.depth == 0) return;
        const PackedWeights panels = packed_ ? packed_ : packed_for_now(key_of(weights), packing(weights));
        share_linear(call, input.rows, sizes.depth, sizes.columns, sizes.panel,
                     [&](size_t row, size_t rows, size_t first, size_t last) {
                         HWY_DYNAMIC_DISPATCH(LinearMultiply)
                         (input.x.data + row * sizes.depth, rows, sizes.depth, panels.get(), sizes.columns,
                          first, last, y.data + row * sizes.columns);
                     });
    }

private:
    struct Sizes {
        size_t depth, columns, panel = HWY_DYNAMIC_DISPATCH(LinearPanel)();

        explicit Sizes(const Tensor<const float>& weights)
            : depth(weights.dim(transposed ? 1 : 0)), columns(weights.dim(transposed ? 0 : 1)) {}
    };
    static PackedKey key_of(const Tensor<const float>& weights) {
        const Sizes sizes(weights);
        const size_t panels = (sizes.columns + sizes.panel - 1) / sizes.panel;
        return {weights.data, panels, sizes.panel * sizes.depth, kName};
    }
    static PackPanel packing(const Tensor<const float>& weights) {
        return [data = weights.data, sizes = Sizes(weights)](size_t index, float* panel) {
            const size_t start = index * sizes.panel;
            if constexpr (transposed)
                HWY_DYNAMIC_DISPATCH(LinearPackTransposed)(data, sizes.depth, sizes.columns, start, panel);
            else
                HWY_DYNAMIC_DISPATCH(LinearPack)(data, sizes.depth, sizes.columns, start, panel);
        };
    }

    PackedWeights packed_;
};

const Registered<Linear<false>, Linear<true>> registered;

}  // namespace
}  // namespace lvlm
#endif
