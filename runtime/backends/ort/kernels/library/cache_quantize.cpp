// lvlm::CacheQuantize: keys or values as entries of 8 bits.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cache_quantize.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "entries-inl.h"
#include "op.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

template <class T>
void StoreAll(const T* from, size_t count, size_t width, int8_t* to) {
    Padded wide(width);
    for (size_t i = 0; i < count; ++i) {
        CopyScaled(from + i * width, width, 1, wide.data());
        StoreEntry(wide.data(), width, to + i * entry_width<int8_t>(width));
    }
}

void StoreFloat(const float* from, size_t count, size_t width, int8_t* to) { StoreAll(from, count, width, to); }
void StoreHalf(const Half* from, size_t count, size_t width, int8_t* to) { StoreAll(from, count, width, to); }

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(StoreFloat);
HWY_EXPORT(StoreHalf);

void store(const float* from, size_t count, size_t width, int8_t* to) {
    HWY_DYNAMIC_DISPATCH(StoreFloat)(from, count, width, to);
}
void store(const Half* from, size_t count, size_t width, int8_t* to) {
    HWY_DYNAMIC_DISPATCH(StoreHalf)(from, count, width, to);
}

template <class T>
class CacheQuantize {
public:
    static constexpr const char* kName = "CacheQuantize";
    static constexpr Port kInputs[] = {{element<T>()}};
    static constexpr Port kOutputs[] = {{Element::kInt8}};

    explicit CacheQuantize(const Attributes&) {}

    void operator()(Call& call) const {
        const auto states = call.input<T>(0, 4);
        const size_t width = states.dim(3), entry = entry_width<int8_t>(width);
        const auto entries =
            call.output<int8_t>(0, {states.dim(0), states.dim(1), states.dim(2), int64_t(entry)});
        const size_t count = states.dim(0) * states.dim(1) * states.dim(2);
        call.parallel((count + kEntries - 1) / kEntries, [&](size_t task) {
            const size_t first = task * kEntries, here = std::min(kEntries, count - first);
            store(states.data + first * width, here, width, entries.data + first * entry);
        });
    }

private:
    static constexpr size_t kEntries = 256;  // of a task
};

const Registered<CacheQuantize<float>, CacheQuantize<Half>> registered;

}  // namespace
}  // namespace lvlm
#endif
