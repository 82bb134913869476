// lvlm::TokenImportance: the attention that each position of a prompt receives from chosen queries.
#include <algorithm>

#include "column_sums.h"

namespace lvlm {
namespace {

template <class T>
class TokenImportance {
public:
    static constexpr const char* kName = "TokenImportance";
    static constexpr Port kInputs[] = {
        {element<T>()}, {element<T>()}, {Element::kInt64}, {Element::kInt64}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit TokenImportance(const Attributes& attributes)
        : scale_(attributes.number("scale")), softcap_(attributes.number("softcap", 0)) {}

    void operator()(Call& call) const {
        const auto query = call.input<T>(0, 4), key = call.input<T>(1, 4);
        const auto index = call.input<int64_t>(2, 2), image_id = call.input<int64_t>(3, 2);
        const auto importance = call.output<float>(0, {key.dim(0), key.dim(2)});
        const size_t rows = query.dim(2), positions = key.dim(2), width = query.dim(3);
        const size_t heads = query.dim(1), key_heads = key.dim(1);
        require(query.dim(0) == key.dim(0) && query.dim(3) == key.dim(3) && key_heads > 0 &&
                    heads % key_heads == 0 && index.shape == Shape{key.dim(0), query.dim(2)} &&
                    image_id.shape == Shape{key.dim(0), key.dim(2)},
                "query, key, query_index and image_id do not fit");
        std::vector<Scored<T>> batch(key.dim(0));
        std::vector<size_t> asked(batch.size(), 0);
        for (size_t b = 0; b < batch.size(); ++b) {
            Scored<T>& scored = batch[b];
            scored = {heads, key_heads, rows, width, positions, scale_, softcap_,
                      query.data + b * heads * rows * width,
                      key.data + b * key_heads * positions * width, {}, {}, {}};
            for (size_t i = 0; i < positions; ++i)  // padding, on either side, is seen by none
                if (image_id.data[b * positions + i] >= 0) scored.keys.push_back(i);
            for (size_t r = 0; r < rows; ++r) {
                const int64_t last = index.data[b * rows + r];
                asked[b] += last >= 0;
                const auto end = std::upper_bound(scored.keys.begin(), scored.keys.end(), last);
                const size_t visible = end - scored.keys.begin();
                if (last >= 0 && visible > 0) scored.used.push_back({r, visible});
            }
        }
        if (!batch.empty()) column_sums(call, batch);
        for (size_t b = 0; b < batch.size(); ++b) {
            float* to = importance.data + b * positions;
            std::fill(to, to + positions, 0.0f);
            const auto shared = static_cast<float>(std::max<size_t>(asked[b], 1) * heads);
            for (size_t i = 0; i < batch[b].sums.size(); ++i)
                to[batch[b].keys[i]] = batch[b].sums[i] / shared;
        }
    }

private:
    float scale_, softcap_;
};

const Registered<TokenImportance<float>, TokenImportance<Half>> registered;

}  // namespace
}  // namespace lvlm
