// A libcuda.so.1 without a GPU: memory is the host's, copies are made, kernels only noted down.
//
//   FAKE_CUDA_SM          the compute capability that the device says it has, as 87
//   FAKE_CUDA_LOG         a file to which every launch is added, a line of JSON each
//   FAKE_CUDA_PARAMETERS  a file with a kernel's name and the bytes of each of its parameters per line
//   FAKE_CUDA_REFUSES     "cubin": code for a GPU is refused as if of a later CUDA, PTX is not
//   FAKE_CUDA_OFFSET      bytes by which memory lies beside where the driver would put it, as 8

#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#define FAKE extern "C" __attribute__((visibility("default"))) CUresult

namespace
{

std::string variable(char const* name)
{
    char const* value = std::getenv(name);
    return value ? value : "";
}

bool isElf(unsigned char const* image)
{
    return !std::memcmp(image, "\x7f" "ELF", 4);
}

template <typename T>
T at(unsigned char const* image, size_t offset)
{
    T value;
    std::memcpy(&value, image + offset, sizeof value);
    return value;
}

// Of an ELF file with 64 bits, from its headers; of PTX, with the zero at its end.
size_t imageBytes(unsigned char const* image)
{
    if (!isElf(image))
    {
        return std::strlen(reinterpret_cast<char const*>(image)) + 1;
    }
    auto const sections = at<uint64_t>(image, 40) + size_t{at<uint16_t>(image, 58)} * at<uint16_t>(image, 60);
    auto const segments = at<uint64_t>(image, 32) + size_t{at<uint16_t>(image, 54)} * at<uint16_t>(image, 56);
    return std::max(sections, segments);
}

uint64_t hashOf(unsigned char const* data, size_t bytes)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < bytes; ++i)
    {
        hash = (hash ^ data[i]) * 0x100000001b3;
    }
    return hash;
}

struct Module
{
    unsigned char const* image;
    size_t bytes;
};

struct Function
{
    Module* module;
    std::string name;
    int sharedLimit;
};

std::vector<std::function<void()>>* gCapture = nullptr; // of a stream that is captured
int gContext;

std::vector<size_t> parametersOf(std::string const& kernel)
{
    std::ifstream file(variable("FAKE_CUDA_PARAMETERS"));
    for (std::string line; std::getline(file, line);)
    {
        std::istringstream words(line);
        std::string name;
        words >> name;
        if (name == kernel)
        {
            std::vector<size_t> sizes;
            for (size_t bytes; words >> bytes;)
            {
                sizes.push_back(bytes);
            }
            return sizes;
        }
    }
    return {};
}

void perform(std::function<void()> const& work)
{
    if (gCapture)
    {
        gCapture->push_back(work);
    }
    else
    {
        work();
    }
}

void note(std::string const& line)
{
    std::ofstream(variable("FAKE_CUDA_LOG"), std::ios::app) << line << "\n";
}

} // namespace

FAKE cuInit(unsigned) { return CUDA_SUCCESS; }
FAKE cuDeviceGet(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
FAKE cuCtxGetDevice(CUdevice* device) { *device = 0; return CUDA_SUCCESS; }
FAKE cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice)
{
    *context = reinterpret_cast<CUcontext>(&gContext);
    return CUDA_SUCCESS;
}
FAKE cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
FAKE cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
FAKE cuCtxGetId(CUcontext, unsigned long long* id) { *id = 7; return CUDA_SUCCESS; }

FAKE cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
{
    int const sm = std::stoi(variable("FAKE_CUDA_SM"));
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
    return CUDA_SUCCESS;
}

FAKE cuGetErrorString(CUresult result, char const** text)
{
    *text = result == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no binary for this GPU" : "fake error";
    return CUDA_SUCCESS;
}

FAKE cuModuleLoadData(CUmodule* module, void const* data)
{
    auto const* image = static_cast<unsigned char const*>(data);
    if (isElf(image) && variable("FAKE_CUDA_REFUSES") == "cubin")
    {
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    *module = reinterpret_cast<CUmodule>(new Module{image, imageBytes(image)});
    return CUDA_SUCCESS;
}

FAKE cuModuleUnload(CUmodule module)
{
    delete reinterpret_cast<Module*>(module);
    return CUDA_SUCCESS;
}

FAKE cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    auto* const from = reinterpret_cast<Module*>(module);
    auto const* end = from->image + from->bytes;
    if (std::search(from->image, end, name, name + std::strlen(name)) == end)
    {
        return CUDA_ERROR_NOT_FOUND;
    }
    *function = reinterpret_cast<CUfunction>(new Function{from, name, 48 << 10});
    return CUDA_SUCCESS;
}

FAKE cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int value)
{
    reinterpret_cast<Function*>(function)->sharedLimit = value;
    return CUDA_SUCCESS;
}

FAKE cuFuncLoad(CUfunction) { return gCapture ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }

FAKE cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned, unsigned, unsigned shared, CUstream, void** parameters, void**)
{
    auto const* kernel = reinterpret_cast<Function*>(function);
    if (static_cast<int>(shared) > kernel->sharedLimit)
    {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::ostringstream line;
    line << "{\"kernel\": \"" << kernel->name << "\", \"image\": "
         << hashOf(kernel->module->image, kernel->module->bytes) << ", \"grid\": [" << gridX << ", " << gridY
         << ", " << gridZ << "], \"threads\": " << blockX << ", \"shared\": " << shared
         << ", \"captured\": " << (gCapture ? "true" : "false") << ", \"arguments\": [";
    std::vector<size_t> const sizes = parametersOf(kernel->name);
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        uint64_t value = 0;
        std::memcpy(&value, parameters[i], sizes[i]);
        line << (i ? ", " : "") << value;
    }
    note(line.str() + "]}");
    return CUDA_SUCCESS;
}

FAKE cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes)
{
    std::string const beside = variable("FAKE_CUDA_OFFSET");
    size_t const offset = beside.empty() ? 0 : std::stoul(beside);
    *pointer = reinterpret_cast<CUdeviceptr>(
                   std::aligned_alloc(256, (bytes + offset + 255) / 256 * 256))
        + offset;
    return CUDA_SUCCESS;
}
FAKE cuMemFree_v2(CUdeviceptr pointer)
{
    std::free(reinterpret_cast<void*>(pointer / 256 * 256));
    return CUDA_SUCCESS;
}
FAKE cuMemcpyHtoD_v2(CUdeviceptr to, void const* from, size_t bytes)
{
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return CUDA_SUCCESS;
}
FAKE cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes)
{
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return CUDA_SUCCESS;
}
FAKE cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes)
{
    std::memset(reinterpret_cast<void*>(to), value, bytes);
    return CUDA_SUCCESS;
}
FAKE cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream)
{
    perform([=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return CUDA_SUCCESS;
}

FAKE cuStreamCreate(CUstream* stream, unsigned)
{
    *stream = reinterpret_cast<CUstream>(&gContext);
    return CUDA_SUCCESS;
}
FAKE cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }
FAKE cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode)
{
    gCapture = new std::vector<std::function<void()>>;
    return CUDA_SUCCESS;
}
FAKE cuStreamEndCapture(CUstream, CUgraph* graph)
{
    *graph = reinterpret_cast<CUgraph>(gCapture);
    gCapture = nullptr;
    return CUDA_SUCCESS;
}
FAKE cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long)
{
    *executable = reinterpret_cast<CUgraphExec>(graph);
    return CUDA_SUCCESS;
}
FAKE cuGraphLaunch(CUgraphExec executable, CUstream)
{
    for (auto const& work : *reinterpret_cast<std::vector<std::function<void()>>*>(executable))
    {
        work();
    }
    return CUDA_SUCCESS;
}
FAKE cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
FAKE cuGraphDestroy(CUgraph graph)
{
    delete reinterpret_cast<std::vector<std::function<void()>>*>(graph);
    return CUDA_SUCCESS;
}

FAKE cuEventCreate(CUevent*, unsigned) { return CUDA_SUCCESS; }
FAKE cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }
FAKE cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
#undef cuEventElapsedTime
FAKE cuEventElapsedTime(float* milliseconds, CUevent, CUevent) { *milliseconds = 1; return CUDA_SUCCESS; }
