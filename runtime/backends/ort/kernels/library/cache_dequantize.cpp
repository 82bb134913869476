// lvlm::CacheDequantize: entries of 8 bits as the numbers they stand for.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cache_dequantize.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "entries-inl.h"
#include "op.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

void SpreadFloat(const int8_t* from, size_t count, size_t width, float* to) {
    for (size_t i = 0; i < count; ++i) LoadEntry(from + i * entry_width<int8_t>(width), width, to + i * width);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lvlm {
namespace {

HWY_EXPORT(SpreadFloat);

void spread(const int8_t* from, size_t count, size_t width, float* to) {
    HWY_DYNAMIC_DISPATCH(SpreadFloat)(from, count, width, to);
}

class CacheDequantize {
public:
    static constexpr const char* kName = "CacheDequantize";
    static constexpr Port kInputs[] = {{Element::kInt8}};
    static constexpr Port kOutputs[] = {{Element::kFloat}};

    explicit CacheDequantize(const Attributes&) {}

    void operator()(Call& call) const {
        const auto entries = call.input<int8_t>(0, 4);
        require(entries.dim(3) > 0, "entries have no scale");
        const size_t entry = entries.dim(3), width = entry - kScaled<int8_t>;
        const auto states =
            call.output<float>(0, {entries.dim(0), entries.dim(1), entries.dim(2), int64_t(width)});
        const size_t count = entries.dim(0) * entries.dim(1) * entries.dim(2);
        call.parallel((count + kEntries - 1) / kEntries, [&](size_t task) {
            const size_t first = task * kEntries, here = std::min(kEntries, count - first);
            spread(entries.data + first * entry, here, width, states.data + first * width);
        });
    }

private:
    static constexpr size_t kEntries = 256;  // of a task
};

const Registered<CacheDequantize> registered;

}  // namespace
}  // namespace lvlm
#endif
