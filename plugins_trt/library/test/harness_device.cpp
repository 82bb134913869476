#include "harness_device.h"

#include "driver.h"
#include "log.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#define LVLM_HARNESS_FUNCTIONS(F)                                                                  \
    F(cuInit, "")                                                                                  \
    F(cuDeviceGet, "")                                                                             \
    F(cuDevicePrimaryCtxRetain, "")                                                                \
    F(cuCtxSetCurrent, "")                                                                         \
    F(cuMemAlloc, "_v2")                                                                           \
    F(cuMemFree, "_v2")                                                                            \
    F(cuMemcpyHtoD, "_v2")                                                                         \
    F(cuMemcpyDtoH, "_v2")                                                                         \
    F(cuMemsetD8, "_v2")                                                                           \
    F(cuStreamCreate, "")                                                                          \
    F(cuStreamSynchronize, "")                                                                     \
    F(cuStreamBeginCapture, "_v2")                                                                 \
    F(cuStreamEndCapture, "")                                                                      \
    F(cuGraphInstantiateWithFlags, "")                                                             \
    F(cuGraphLaunch, "")                                                                           \
    F(cuGraphExecDestroy, "")                                                                      \
    F(cuGraphDestroy, "")                                                                          \
    F(cuEventCreate, "")                                                                           \
    F(cuEventRecord, "")                                                                           \
    F(cuEventSynchronize, "")                                                                      \
    F(cuEventElapsedTime, "")

namespace harness
{
namespace
{

using lvlm::Error;

struct HarnessDriver
{
    LVLM_HARNESS_FUNCTIONS(LVLM_CUDA_MEMBER)
};

HarnessDriver const& cuda()
{
    static HarnessDriver const found = []
    {
        HarnessDriver driver{};
        LVLM_HARNESS_FUNCTIONS(LVLM_CUDA_FIND)
        return driver;
    }();
    return found;
}

void check(CUresult result, char const* doing)
{
    lvlm::Driver::get().check(result, doing);
}

// A context and a stream, for the whole process.
CUstream stream()
{
    static CUstream const made = []
    {
        CUdevice device{};
        CUcontext context{};
        CUstream found{};
        check(cuda().cuInit(0), "start");
        check(cuda().cuDeviceGet(&device, 0), "first device");
        check(cuda().cuDevicePrimaryCtxRetain(&context, device), "context");
        check(cuda().cuCtxSetCurrent(context), "context");
        check(cuda().cuStreamCreate(&found, CU_STREAM_NON_BLOCKING), "stream");
        return found;
    }();
    return made;
}

class Memory
{
public:
    Memory(size_t bytes, bool raw)
        : mBytes(bytes)
    {
        check(cuda().cuMemAlloc(&mPointer, std::max<size_t>(bytes, 1)), "allocate");
        if (!raw)
        {
            fill();
        }
    }
    Memory(Memory&& other) noexcept
        : mPointer(std::exchange(other.mPointer, 0))
        , mBytes(other.mBytes)
    {
    }
    ~Memory()
    {
        if (mPointer)
        {
            cuda().cuMemFree(mPointer);
        }
    }

    // Not a number, whatever the type of float
    void fill() const { check(cuda().cuMemsetD8(mPointer, 0xFF, std::max<size_t>(mBytes, 1)), "fill"); }

    void write(std::vector<char> const& data) const
    {
        if (mBytes)
        {
            check(cuda().cuMemcpyHtoD(mPointer, data.data(), mBytes), "copy to the device");
        }
    }

    std::vector<char> read() const
    {
        std::vector<char> data(mBytes);
        if (mBytes)
        {
            check(cuda().cuMemcpyDtoH(data.data(), mPointer, mBytes), "copy from the device");
        }
        return data;
    }

    CUdeviceptr pointer() const { return mPointer; }
    void* address() const { return reinterpret_cast<void*>(mPointer); }
    size_t bytes() const { return mBytes; }

private:
    CUdeviceptr mPointer{};
    size_t mBytes;
};

// Work of a stream, captured.
class Graph
{
public:
    template <typename Body>
    explicit Graph(Body body)
    {
        check(cuda().cuStreamBeginCapture(stream(), CU_STREAM_CAPTURE_MODE_GLOBAL), "capture");
        body();
        check(cuda().cuStreamEndCapture(stream(), &mGraph), "capture");
        check(cuda().cuGraphInstantiateWithFlags(&mExecutable, mGraph, 0), "graph");
    }
    Graph(Graph const&) = delete;
    ~Graph()
    {
        if (mExecutable)
        {
            cuda().cuGraphExecDestroy(mExecutable);
        }
        if (mGraph)
        {
            cuda().cuGraphDestroy(mGraph);
        }
    }

    void launch() const { check(cuda().cuGraphLaunch(mExecutable, stream()), "graph"); }

private:
    CUgraph mGraph{};
    CUgraphExec mExecutable{};
};

std::vector<char> contents(Input const& input)
{
    std::ifstream file(input.file, std::ios::binary);
    std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
    if (!file || data.size() != bytesOf(input.type, input.dims))
    {
        throw Error(input.name + ": '" + input.file + "' does not hold its "
            + std::to_string(bytesOf(input.type, input.dims)) + " bytes");
    }
    return data;
}

// Median microseconds of `body`, which runs often enough in a row to be measured.
template <typename Body>
double timed(int32_t repeats, Body body)
{
    constexpr int32_t kROUNDS = 9;
    CUevent begin{};
    CUevent end{};
    check(cuda().cuEventCreate(&begin, CU_EVENT_DEFAULT), "event");
    check(cuda().cuEventCreate(&end, CU_EVENT_DEFAULT), "event");
    std::vector<double> rounds;
    for (int32_t round = 0; round <= kROUNDS; ++round)
    {
        check(cuda().cuEventRecord(begin, stream()), "event");
        for (int32_t i = 0; i < repeats; ++i)
        {
            body();
        }
        check(cuda().cuEventRecord(end, stream()), "event");
        check(cuda().cuEventSynchronize(end), "event");
        float milliseconds{};
        check(cuda().cuEventElapsedTime(&milliseconds, begin, end), "event");
        if (round > 0) // the first one warms up
        {
            rounds.push_back(1e3 * milliseconds / repeats);
        }
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[rounds.size() / 2];
}

nvinfer1::PluginTensorDesc described(nvinfer1::DataType type, nvinfer1::Dims const& dims)
{
    return {dims, type, nvinfer1::TensorFormat::kLINEAR, 1.0F};
}

} // namespace

Run runOnDevice(nvinfer1::IPluginV3OneRuntime& plugin, Case const& asked,
    std::vector<Output> const& outputs, size_t workspaceBytes, Options const& options)
{
    stream();
    std::vector<nvinfer1::PluginTensorDesc> inputDescs;
    std::vector<nvinfer1::PluginTensorDesc> outputDescs;
    std::vector<Memory> inputMemory;
    std::vector<Memory> outputMemory;
    std::vector<void const*> from;
    std::vector<void*> to;
    std::vector<void*> inPlace;
    Memory const workspace(workspaceBytes, options.raw);
    Run run{};
    for (Input const& input : asked.inputs)
    {
        inputDescs.push_back(described(input.type, input.dims));
        inputMemory.emplace_back(bytesOf(input.type, input.dims), true);
        inputMemory.back().write(contents(input));
        from.push_back(inputMemory.back().address());
        run.inputs.push_back(inputMemory.back().pointer());
    }
    for (Output const& output : outputs)
    {
        outputDescs.push_back(described(output.type, output.dims));
        outputMemory.emplace_back(bytesOf(output.type, output.dims), options.raw);
        to.push_back(outputMemory.back().address());
        inPlace.push_back(output.alias < 0 ? to.back() : inputMemory[output.alias].address());
        run.outputs.push_back(outputMemory.back().pointer());
    }
    run.workspace = workspace.pointer();

    auto const enqueue = [&](std::vector<void*> const& targets) {
        if (plugin.enqueue(inputDescs.data(), outputDescs.data(), from.data(), targets.data(),
                workspace.address(), reinterpret_cast<cudaStream_t>(stream())))
        {
            throw Error("enqueue failed");
        }
    };
    if (plugin.onShapeChange(inputDescs.data(), static_cast<int32_t>(inputDescs.size()),
            outputDescs.data(), static_cast<int32_t>(outputDescs.size())))
    {
        throw Error("onShapeChange failed");
    }
    enqueue(to);
    check(cuda().cuStreamSynchronize(stream()), "run");
    std::vector<std::vector<char>> results;
    std::string const stem = asked.path.substr(asked.path.find_last_of('/') + 1);
    for (size_t i = 0; i < outputs.size(); ++i)
    {
        results.push_back(outputMemory[i].read());
        run.files.push_back(options.folder + "/" + stem + "." + outputs[i].name + ".bin");
        std::ofstream file(run.files.back(), std::ios::binary);
        if (!file.write(results[i].data(), static_cast<std::streamsize>(results[i].size())))
        {
            throw Error(run.files.back() + " cannot be written");
        }
        outputMemory[i].fill();
    }

    Graph const graph([&] { enqueue(inPlace); });
    graph.launch();
    check(cuda().cuStreamSynchronize(stream()), "run a graph");
    run.graphEqual = true;
    for (size_t i = 0; i < outputs.size(); ++i)
    {
        bool const own = outputs[i].alias < 0;
        run.graphEqual &= (own ? outputMemory[i] : inputMemory[outputs[i].alias]).read() == results[i];
    }

    if (options.repeats > 0)
    {
        Memory const source(asked.traffic / 2, false);
        Memory const target(asked.traffic / 2, false);
        run.enqueueTime = timed(options.repeats, [&] { enqueue(inPlace); });
        run.graphTime = timed(options.repeats, [&] { graph.launch(); });
        run.copyTime = timed(options.repeats, [&] {
            check(lvlm::Driver::get().cuMemcpyDtoDAsync(target.pointer(), source.pointer(),
                      std::max<size_t>(source.bytes(), 1), stream()),
                "copy");
        });
    }
    return run;
}

} // namespace harness
