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
#include "op.h"
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
void LinearMultiply(const float* x, size_t rows, size_t depth, const float* panels, size_t columns, size_t first,
              size_t last, float* y) {
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

constexpr size_t kBlock = 96;      // rows at a time, which stay in the second-level cache
constexpr size_t kTasks = 32;      // about, for threads to share
constexpr size_t kLeast = 1 << 16;  // multiply-adds of a task, for its start to be little beside it

template <bool transposed>
class Linear {
public:
    static constexpr const char* kName = transposed ? "TransposedLinear" : "Linear";
    static constexpr const char* kDomain = "lvlm.lowered";
    static constexpr Port kInputs[] = {{Element::kFloat}, {Element::kFloat}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit Linear(const Attributes& attributes) {
        const auto weights = attributes.constant<float>(1);
        if (weights && weights.shape.size() == 2)
            packed_ = packed_weights(weights.data, Sizes(weights).packed(),
                                     [&](size_t index, float* panel) { pack(weights, index, panel); });
    }

    void operator()(Call& call) const {
        const auto x = call.input<float>(0);
        const auto weights = call.input<float>(1, 2);
        const auto [depth, columns] = Sizes(weights);
        require(!x.shape.empty() && x.shape.back() == int64_t(depth), "input and weights do not fit");
        Shape shape = x.shape;
        shape.back() = columns;
        const auto y = call.output<float>(0, shape);
        size_t rows = 1;
        for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
        if (rows == 0 || columns == 0) return;
        if (depth == 0) {
            std::fill(y.data, y.data + rows * columns, 0.0f);
            return;
        }

        PackedWeights panels = packed_;
        if (panels == nullptr) {
            const PackedSizes sizes = Sizes(weights).packed();
            auto own = std::make_shared<Padded>(sizes.panels * sizes.panel);
            for (size_t index = 0; index < sizes.panels; ++index)
                pack(weights, index, own->data() + index * sizes.panel);
            panels = PackedWeights(own, own->data());
        }
        const size_t panel = HWY_DYNAMIC_DISPATCH(LinearPanel)();
        const size_t all = (columns + panel - 1) / panel, blocks = (rows + kBlock - 1) / kBlock;
        const size_t worth = std::max<size_t>(1, std::min(rows, kBlock) * depth * columns / kLeast);
        const size_t parts = std::min({all, worth, std::max<size_t>(1, kTasks / blocks)});
        call.parallel(blocks * parts, [&](size_t task) {
            const size_t row = rows * (task / parts) / blocks, part = task % parts;
            const size_t count = rows * (task / parts + 1) / blocks - row;
            const size_t first = all * part / parts * panel;
            const size_t last = std::min(columns, all * (part + 1) / parts * panel);
            HWY_DYNAMIC_DISPATCH(LinearMultiply)
            (x.data + row * depth, count, depth, panels.get(), columns, first, last, y.data + row * columns);
        });
    }

private:
    struct Sizes {
        size_t depth, columns;

        explicit Sizes(const Tensor<const float>& weights)
            : depth(weights.dim(transposed ? 1 : 0)), columns(weights.dim(transposed ? 0 : 1)) {}
        PackedSizes packed() const {
            const size_t panel = HWY_DYNAMIC_DISPATCH(LinearPanel)();
            return {(columns + panel - 1) / panel, panel * depth, transposed};
        }
    };
    static void pack(const Tensor<const float>& weights, size_t index, float* panel) {
        const Sizes sizes(weights);
        const size_t start = index * HWY_DYNAMIC_DISPATCH(LinearPanel)();
        if constexpr (transposed)
            HWY_DYNAMIC_DISPATCH(LinearPackTransposed)
            (weights.data, sizes.depth, sizes.columns, start, panel);
        else
            HWY_DYNAMIC_DISPATCH(LinearPack)(weights.data, sizes.depth, sizes.columns, start, panel);
    }

    PackedWeights packed_;
};

const Registered<Linear<false>, Linear<true>> registered;

}  // namespace
}  // namespace lvlm
#endif
