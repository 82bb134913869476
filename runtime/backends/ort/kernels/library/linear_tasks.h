// Tasks of a linear layer, and the rows of its input.
#pragma once

#include <algorithm>

#include "op.h"

namespace lvlm {

constexpr size_t kRowBlock = 96;          // rows at a time, which stay in the second-level cache
constexpr size_t kLinearTasks = 32;       // about, for threads to share
constexpr size_t kLeastWork = 1 << 16;    // multiply-adds of a task, for its start to be little beside it

// The input [.., depth] of a linear layer; raises if its last axis is another.
struct LinearInput {
    Tensor<const float> x;
    size_t rows = 1;

    LinearInput(const Call& call, size_t depth) : x(call.input<float>(0)) {
        require(!x.shape.empty() && x.shape.back() == int64_t(depth), "input and weights do not fit");
        for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) rows *= x.shape[axis];
    }
    // The output [.., columns].
    Tensor<float> output(const Call& call, size_t columns) const {
        Shape shape = x.shape;
        shape.back() = columns;
        return call.output<float>(0, shape);
    }
};

// Calls task(row, rows, first, last) for parts of all rows and columns, by sizes alone. ``first`` is a multiple
// of ``panel`` columns.
template <class Task>
void share_linear(const Call& call, size_t rows, size_t depth, size_t columns, size_t panel, Task&& task) {
    if (rows == 0 || columns == 0) return;
    const size_t all = (columns + panel - 1) / panel, blocks = (rows + kRowBlock - 1) / kRowBlock;
    const size_t worth = std::max<size_t>(1, std::min(rows, kRowBlock) * depth * columns / kLeastWork);
    const size_t parts = std::min({all, worth, std::max<size_t>(1, kLinearTasks / blocks)});
    call.parallel(blocks * parts, [&](size_t i) {
        const size_t block = i / parts, part = i % parts, row = rows * block / blocks;
        task(row, rows * (block + 1) / blocks - row, all * part / parts * panel,
             std::min(columns, all * (part + 1) / parts * panel));
    });
}

}  // namespace lvlm
