// lvlm::CacheUpdate: new entries into a cache, in every row from a slot of its own.
#include <cstring>

#include "op.h"

namespace lvlm {
namespace {

template <class T>
class CacheUpdate {
public:
    static constexpr const char* kName = "CacheUpdate";
    static constexpr Port kInputs[] = {{element<T>()}, {element<T>()}, {Element::kInt64}};
    static constexpr Port kOutputs[] = {{element<T>()}};

    explicit CacheUpdate(const Attributes&) {}

    void operator()(Call& call) const {
        const auto cache = call.input<T>(0, 4), update = call.input<T>(1, 4);
        const auto index = call.input<int64_t>(2, 1);
        const auto updated = call.output<T>(0, cache.shape);
        const int64_t heads = cache.dim(1), slots = cache.dim(2), width = cache.dim(3);
        const int64_t entries = update.dim(2);
        require(update.dim(1) == heads && update.dim(3) == width && update.dim(0) == cache.dim(0) &&
                    index.dim(0) == cache.dim(0),
                "cache, update and index do not fit");
        for (int64_t row = 0; row < cache.dim(0); ++row) {
            const int64_t first = index.data[row];
            require(first >= 0 && first + entries <= slots, "entries go beyond the cache");
            for (int64_t head = row * heads; head < (row + 1) * heads; ++head) {
                const int64_t at = head * slots * width;
                if (updated.data != cache.data)  // bound to the same memory: in place
                    std::memcpy(updated.data + at, cache.data + at, slots * width * sizeof(T));
                std::memcpy(updated.data + at + first * width, update.data + head * entries * width,
                            entries * width * sizeof(T));
            }
        }
    }
};

const Registered<CacheUpdate<float>, CacheUpdate<Half>> registered;

}  // namespace
}  // namespace lvlm
