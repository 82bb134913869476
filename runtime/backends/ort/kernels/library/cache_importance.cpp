// lvlm::CacheImportance: the attention that each cached position receives from many queries.
#include <algorithm>

#include "column_sums.h"

namespace lvlm {
namespace {

template <class T>
class CacheImportance {
public:
    static constexpr const char* kName = "CacheImportance";
    static constexpr Port kInputs[] = {
        {element<T>()}, {element<T>()}, {Element::kInt64}, {Element::kInt64}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit CacheImportance(const Attributes& attributes)
        : scale_(attributes.number("scale")), softcap_(attributes.number("softcap", 0)) {}

    void operator()(Call& call) const {
        const auto query = call.input<T>(0, 4), key = call.input<T>(1, 4);
        const auto slots = call.input<int64_t>(2, 2), length = call.input<int64_t>(3, 1);
        const auto importance = call.output<float>(0, {key.dim(0), key.dim(2)});
        const size_t rows = query.dim(2), positions = key.dim(2), width = query.dim(3);
        const size_t heads = query.dim(1), key_heads = key.dim(1);
        require(query.dim(0) == key.dim(0) && query.dim(3) == key.dim(3) && key_heads > 0 &&
                    heads % key_heads == 0 && slots.shape == Shape{key.dim(0), query.dim(2)} &&
                    length.dim(0) == key.dim(0),
                "query, key, query_slot and length do not fit");
        std::vector<Scored<T>> batch(key.dim(0));
        for (size_t b = 0; b < batch.size(); ++b) {
            Scored<T>& scored = batch[b];
            scored = {heads, key_heads, rows, width, positions, scale_, softcap_,
                      query.data + b * heads * rows * width,
                      key.data + b * key_heads * positions * width, {}, {}, {}};
            const int64_t valid = std::clamp<int64_t>(length.data[b], 0, positions);
            int64_t seen = 0;
            for (size_t r = 0; r < rows; ++r) {
                const int64_t slot = slots.data[b * rows + r];
                if (slot < 0 || slot >= valid) continue;
                scored.used.push_back({r, static_cast<size_t>(slot) + 1});
                seen = std::max(seen, slot + 1);
            }
            for (int64_t i = 0; i < seen; ++i) scored.keys.push_back(i);
        }
        if (!batch.empty()) column_sums(call, batch);
        for (size_t b = 0; b < batch.size(); ++b) {
            float* to = importance.data + b * positions;
            std::fill(to, to + positions, 0.0f);
            for (size_t i = 0; i < batch[b].sums.size(); ++i)
                to[i] = batch[b].sums[i] / static_cast<float>(heads);
        }
    }

private:
    float scale_, softcap_;
};

const Registered<CacheImportance<float>, CacheImportance<Half>> registered;

}  // namespace
}  // namespace lvlm
