// Column sums, for two ops: the attention that keys receive from chosen queries, summed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "op.h"

namespace lvlm {

// A query row that counts, and how many of the keys it sees, the first of them.
struct ScoringRow {
    size_t row, visible;
};

// One row of the batch.
template <class T>
struct Scored {
    size_t heads, key_heads, rows, width, positions;
    float scale;
    float softcap;   // of logits, 0: none
    const T* query;  // [heads, rows, width]
    const T* key;    // [key heads, positions, width]
    std::vector<int64_t> keys;      // positions of those that may be seen, rising
    std::vector<ScoringRow> used;
    std::vector<float> sums;        // out: of each of ``keys``, over used rows and heads
};

void column_sums(const Call& call, std::vector<Scored<float>>& batch);
void column_sums(const Call& call, std::vector<Scored<Half>>& batch);

}  // namespace lvlm
