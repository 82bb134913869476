// One call of a plugin: what its table comes to for inputs of these types and shapes.
#pragma once

#include "attributes.h"
#include "sizes.h"

#include <cuda.h>

namespace lvlm
{

// Null pointers stand for inputs that are not there.
struct Call
{
    PluginTable const& table;
    Values const& values;
    int32_t word; // of the variant attribute
    Type data;    // what kData is
    Shapes shapes;

    // Bytes of each scratch buffer, rounded up so that the next one is aligned; 0: not there.
    std::vector<size_t> scratchBytes() const;

    // Loads every kernel that enqueue() will launch, which must not happen in a graph's capture.
    void load() const;

    // The tensors' memory, in the table's order.
    struct Memory
    {
        std::vector<void*> inputs;
        std::vector<void*> outputs;
        void* workspace;
    };
    void enqueue(Memory const& memory, CUstream stream) const;

    // All of these throw Error.

private:
    void checkAlignment(Memory const& memory) const;
    bool runs(StepTable const& step) const;
    Kernel const& kernelOf(StepTable const& step) const;
    size_t bytes(Type type, List<Size> const& shape) const;
    void copyAliased(Memory const& memory, CUstream stream) const;
    void enqueueStep(StepTable const& step, Memory const& memory,
        std::vector<void*> const& scratch, CUstream stream) const;
};

} // namespace lvlm
