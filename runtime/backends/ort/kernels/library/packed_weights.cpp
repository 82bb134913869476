#include "packed_weights.h"

#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lvlm {
namespace {

constexpr size_t kPage = size_t{2} << 20;   // bytes of a large page
constexpr size_t kChunk = size_t{32} << 20;  // bytes asked for at once, so that little of a page is left over
constexpr size_t kAlignment = 64;           // floats

// Memory that is freed when nothing in it is used any more. Large pages where the system has them: a row
// of weights after the other is read, and looking up small pages took a third of the time.
class Chunk {
public:
    explicit Chunk(size_t floats) : size_(std::max(floats * sizeof(float), kChunk)) {
#if defined(__linux__)
        size_ = (size_ + kPage - 1) / kPage * kPage;
        mapped_ = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        const auto at = (reinterpret_cast<uintptr_t>(mapped_) + kPage - 1) / kPage * kPage;
        data_ = reinterpret_cast<float*>(at);
        madvise(data_, size_, MADV_HUGEPAGE);
#else
        held_ = hwy::AllocateAligned<float>(size_ / sizeof(float));
        if (!held_) throw std::bad_alloc();
        data_ = held_.get();
#endif
    }
#if defined(__linux__)
    ~Chunk() { munmap(mapped_, size_ + kPage); }
#endif
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;

    // Null: there is no room for so many.
    float* take(size_t floats) {
        const size_t start = (used_ + kAlignment - 1) / kAlignment * kAlignment;
        if ((start + floats) * sizeof(float) > size_) return nullptr;
        used_ = start + floats;
        return data_ + start;
    }

private:
    size_t size_, used_ = 0;
    float* data_ = nullptr;
#if defined(__linux__)
    void* mapped_ = nullptr;
#else
    hwy::AlignedFreeUniquePtr<float[]> held_;
#endif
};

using Key = std::tuple<const void*, size_t, size_t, std::string>;
using Entries = std::map<Key, std::weak_ptr<const float>>;

std::mutex mutex;
Entries& entries() {
    static Entries found;
    return found;
}
std::weak_ptr<Chunk>& newest() {
    static std::weak_ptr<Chunk> chunk;
    return chunk;
}

// True where ``packed`` is what would be packed; as bits, since a NaN equals nothing.
bool is_packed(const float* packed, const PackedKey& key, const PackPanel& pack) {
    std::vector<float> panel(key.panel);
    for (size_t index = 0; index < key.panels; ++index, packed += key.panel) {
        pack(index, panel.data());
        if (std::memcmp(panel.data(), packed, key.panel * sizeof(float)) != 0) return false;
    }
    return true;
}

}  // namespace

PackedWeights packed_weights(const PackedKey& key, const PackPanel& pack) {
    const std::lock_guard<std::mutex> lock(mutex);
    const Key name{key.weights, key.panels, key.panel, key.purpose};
    const auto known = entries().find(name);
    if (known != entries().end()) {
        PackedWeights packed = known->second.lock();
        if (packed && is_packed(packed.get(), key, pack)) return packed;
    }
    for (auto it = entries().begin(); it != entries().end();)
        it = it->second.expired() ? entries().erase(it) : std::next(it);
    const size_t floats = key.panels * key.panel;
    std::shared_ptr<Chunk> chunk = newest().lock();
    float* to = chunk ? chunk->take(floats) : nullptr;
    if (to == nullptr) {
        chunk = std::make_shared<Chunk>(floats);
        newest() = chunk;
        to = chunk->take(floats);
    }
    for (size_t index = 0; index < key.panels; ++index) pack(index, to + index * key.panel);
    PackedWeights packed(chunk, to);
    entries()[name] = packed;
    return packed;
}

PackedWeights packed_for_now(const PackedKey& key, const PackPanel& pack) {
    const auto own = std::make_shared<Padded>(key.panels * key.panel);
    for (size_t index = 0; index < key.panels; ++index) pack(index, own->data() + index * key.panel);
    return {own, own->data()};
}

}  // namespace lvlm
