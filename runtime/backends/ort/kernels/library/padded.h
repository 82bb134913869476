// Memory of a kernel's own: cache lines, and extents that every panel of Highway's targets divides.
#pragma once

#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cstddef>
#include <new>

namespace lvlm {

constexpr size_t kPanelMultiple = 32;  // floats: two vectors of the widest instructions
constexpr size_t kLine = 16;           // floats
constexpr size_t kLineBytes = 64;

inline size_t padded_extent(size_t extent) {
    return (extent + kPanelMultiple - 1) / kPanelMultiple * kPanelMultiple;
}

// Floats, not initialized.
class Padded {
public:
    explicit Padded(size_t size)
        : size_(size), held_(hwy::AllocateAligned<float>(std::max<size_t>(size, 1))) {
        if (!held_) throw std::bad_alloc();
    }
    float* data() { return held_.get(); }
    const float* data() const { return held_.get(); }
    size_t size() const { return size_; }

private:
    size_t size_;
    hwy::AlignedFreeUniquePtr<float[]> held_;
};

}  // namespace lvlm
