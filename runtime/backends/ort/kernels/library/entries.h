// Entries of a cache: numbers of type C, of 8 bits with a byte behind them that says how large their step is
// (export/ops/parts/int8_entries.py).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace lvlm {

template <class C>
constexpr bool kScaled = std::is_same_v<C, int8_t>;

// Numbers of type C that an entry of ``width`` is stored in.
template <class C>
constexpr size_t entry_width(size_t width) {
    return width + kScaled<C>;
}

constexpr int kLowestScale = -128;
constexpr size_t kScales = 256, kBeyond = kScales - 1;
constexpr float kOfLargest = static_cast<float>(1 / 127.49);  // an entry's largest number to its step

// 2 ^ (scale / 8) of every scale, and one divided by that. The last is of entries that are not finite.
struct Steps {
    float step[kScales], per_step[kScales];

    Steps() {
        for (size_t i = 0; i < kScales; ++i) {
            const double power = (static_cast<int>(i) + kLowestScale) / 8.0;
            step[i] = static_cast<float>(std::exp2(power));
            per_step[i] = static_cast<float>(std::exp2(-power));
        }
        step[kBeyond] = std::numeric_limits<float>::quiet_NaN();
        per_step[kBeyond] = 0;
    }
};

inline const Steps& steps() {
    static const Steps only;
    return only;
}

// The step of the numbers of an entry in 8 bits; ``table``: that of all steps.
inline float step_of(const int8_t* entry, size_t width, const float* table) {
    return table[entry[width] - kLowestScale];
}

}  // namespace lvlm
