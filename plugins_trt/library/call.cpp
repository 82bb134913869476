#include "call.h"

#include "data_types.h"
#include "launch.h"
#include "log.h"

namespace lvlm
{
namespace
{

constexpr size_t kALIGNMENT = 256;
constexpr uintptr_t kPOINTERS = 16; // what Triton takes of every pointer as given

std::array<int64_t, 3> gridOf(StepTable const& step, Shapes const& shapes)
{
    std::array<int64_t, 3> grid{1, 1, 1};
    for (int32_t i = 0; i < step.grid.count; ++i)
    {
        grid[i] = evaluate(step.grid[i], shapes);
    }
    return grid;
}

} // namespace

std::vector<size_t> Call::scratchBytes() const
{
    std::vector<size_t> sizes;
    for (ScratchTable const& scratch : table.scratch)
    {
        bool const there = scratch.words >> word & 1U;
        size_t const exact = there ? bytes(scratch.type, scratch.shape) : 0;
        sizes.push_back((exact + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT);
    }
    return sizes;
}

void Call::load() const
{
    for (StepTable const& step : table.steps)
    {
        if (runs(step))
        {
            lvlm::load(kernelOf(step));
        }
    }
}

void Call::enqueue(Memory const& memory, CUstream stream) const
{
    checkAlignment(memory);
    copyAliased(memory, stream);
    std::vector<void*> scratch;
    auto* place = static_cast<char*>(memory.workspace);
    for (size_t const size : scratchBytes())
    {
        scratch.push_back(place);
        place += size;
    }
    for (StepTable const& step : table.steps)
    {
        if (runs(step))
        {
            enqueueStep(step, memory, scratch, stream);
        }
    }
}

// Kernels are compiled for it; one that reads beside it would take the whole context with it.
void Call::checkAlignment(Memory const& memory) const
{
    auto const check = [](char const* name, void const* pointer) {
        if (reinterpret_cast<uintptr_t>(pointer) % kPOINTERS)
        {
            throw Error(std::string{name} + " does not lie at a multiple of "
                + std::to_string(kPOINTERS) + " bytes; kernels need that");
        }
    };
    for (int32_t i = 0; i < table.inputs.count; ++i)
    {
        check(table.inputs[i].name, memory.inputs[i]); // null where it is left out
    }
    for (int32_t i = 0; i < table.outputs.count; ++i)
    {
        check(table.outputs[i].name, memory.outputs[i]);
    }
    check("the workspace", memory.workspace);
}

// Of the variant's word, and with something to do.
bool Call::runs(StepTable const& step) const
{
    if (!(step.words >> word & 1U))
    {
        return false;
    }
    for (int64_t extent : gridOf(step, shapes))
    {
        if (extent <= 0)
        {
            return false;
        }
    }
    return true;
}

// For the data's type, with the first of the blocks that holds the step's number.
Kernel const& Call::kernelOf(StepTable const& step) const
{
    int64_t const needed = step.number.count ? evaluate(step.number, shapes) : 0;
    int64_t largest = 0;
    for (Variant const& variant : step.variants)
    {
        if (variant.data == Type::kData || variant.data == data)
        {
            if (variant.block >= needed)
            {
                return *variant.kernel;
            }
            largest = variant.block;
        }
    }
    throw Error(largest ? "no kernel for a size of " + std::to_string(needed) + "; the largest is "
                    + std::to_string(largest)
                        : std::string{"no kernel for this type of data in the library"});
}

size_t Call::bytes(Type type, List<Size> const& shape) const
{
    auto total = static_cast<int64_t>(elementBytes(type == Type::kData ? data : type));
    for (Size const& size : shape)
    {
        total *= evaluate(size, shapes);
    }
    return static_cast<size_t>(total);
}

// An output that shares an input's memory is that memory already where TensorRT was asked to alias;
// elsewhere it begins as a copy.
void Call::copyAliased(Memory const& memory, CUstream stream) const
{
    for (int32_t i = 0; i < table.outputs.count; ++i)
    {
        OutputTable const& output = table.outputs[i];
        if (output.alias < 0 || memory.inputs[output.alias] == memory.outputs[i])
        {
            continue;
        }
        size_t total = elementBytes(output.type == Type::kData ? data : output.type);
        nvinfer1::Dims const& dims = *shapes[output.alias];
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            total *= static_cast<size_t>(dims.d[axis]);
        }
        if (total)
        {
            Driver const& driver = Driver::get();
            driver.check(
                driver.cuMemcpyDtoDAsync(reinterpret_cast<CUdeviceptr>(memory.outputs[i]),
                    reinterpret_cast<CUdeviceptr>(memory.inputs[output.alias]), total, stream),
                "copy");
        }
    }
}

void Call::enqueueStep(StepTable const& step, Memory const& memory,
    std::vector<void*> const& scratch, CUstream stream) const
{
    // Arguments' values, which stay where they are while pointers to them are handed over
    std::vector<void*> pointers(step.arguments.count);
    std::vector<int32_t> numbers(step.arguments.count);
    std::vector<float> reals(step.arguments.count);
    std::vector<void*> given;
    for (int32_t i = 0; i < step.arguments.count; ++i)
    {
        ArgumentTable const& argument = step.arguments[i];
        void* place = &pointers[i];
        switch (argument.source)
        {
        case Source::kInput: pointers[i] = memory.inputs[argument.index]; break;
        case Source::kOutput: pointers[i] = memory.outputs[argument.index]; break;
        case Source::kScratch: pointers[i] = scratch[argument.index]; break;
        case Source::kSize:
        {
            int64_t const number = evaluate(argument.size, shapes);
            if (number > INT32_MAX || number < INT32_MIN)
            {
                throw Error("a size of " + std::to_string(number) + " is too large for a kernel");
            }
            numbers[i] = static_cast<int32_t>(number);
            place = &numbers[i];
            break;
        }
        case Source::kAttribute:
            numbers[i] = values[argument.index].whole;
            reals[i] = values[argument.index].real;
            place = table.attributes[argument.index].kind == Kind::kFloat
                ? static_cast<void*>(&reals[i])
                : static_cast<void*>(&numbers[i]);
            break;
        }
        given.push_back(place);
    }
    launch(lvlm::load(kernelOf(step)), gridOf(step, shapes), given, stream);
}

} // namespace lvlm
