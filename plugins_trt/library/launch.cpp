#include "launch.h"

#include "log.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace lvlm
{
namespace
{

constexpr uint32_t kPLAIN_SHARED = 48 << 10; // more has to be asked for
constexpr int64_t kMOST_X = INT32_MAX;
constexpr int64_t kMOST_YZ = 65535;

int32_t architecture(Driver const& driver)
{
    CUdevice device{};
    int major{};
    int minor{};
    driver.check(driver.cuCtxGetDevice(&device), "current device");
    driver.check(driver.cuDeviceGetAttribute(
                     &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
        "compute capability");
    driver.check(driver.cuDeviceGetAttribute(
                     &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
        "compute capability");
    return 10 * major + minor;
}

// Images that may run on this architecture, the best first.
std::vector<Image const*> candidates(Kernel const& kernel, int32_t arch)
{
    constexpr int32_t kORIN = 87; // Tegra runs no desktop code
    std::vector<Image const*> fitting;
    for (Image const& image : kernel.images)
    {
        bool const near = !image.alone && arch != kORIN && image.arch / 10 == arch / 10;
        if (image.arch == arch || (image.arch < arch && (image.ptx || near)))
        {
            fitting.push_back(&image);
        }
    }
    auto const rank = [](Image const* image) { return std::make_pair(image->ptx, -image->arch); };
    std::sort(fitting.begin(), fitting.end(),
        [&](Image const* a, Image const* b) { return rank(a) < rank(b); });
    return fitting;
}

CUfunction loadImage(Driver const& driver, Image const& image)
{
    CUmodule module{};
    driver.check(driver.cuModuleLoadData(&module, lvlm_kernels + image.offset), "load kernel");
    try
    {
        CUfunction function{};
        driver.check(driver.cuModuleGetFunction(&function, module, image.entry), "find kernel");
        if (image.shared > kPLAIN_SHARED)
        {
            driver.check(
                driver.cuFuncSetAttribute(function,
                    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(image.shared)),
                "shared memory of the kernel");
        }
        if (driver.loadFunction) // now, not at the first launch, which a graph may be capturing
        {
            driver.check(driver.loadFunction(function), "load kernel");
        }
        return function;
    }
    catch (Error const&)
    {
        driver.cuModuleUnload(module);
        throw;
    }
}

LoadedKernel loadBest(Driver const& driver, Kernel const& kernel)
{
    int32_t const arch = architecture(driver);
    std::string const number = std::to_string(arch);
    std::string refused;
    for (Image const* image : candidates(kernel, arch))
    {
        try
        {
            LoadedKernel const loaded{loadImage(driver, *image), image};
            static std::atomic<bool> told{false};
            if (image->ptx && !told.exchange(true)) // once: it is the same for every kernel
            {
                log(nvinfer1::ILogger::Severity::kWARNING, kernel.name,
                    "compiled from PTX for this GPU, sm_" + number + "; "
                        + (refused.empty() ? "for code of its own: lvlm-build plugins --arch " + number
                                           : "its code was refused (" + refused
                                    + "), a newer CUDA driver may take it"));
            }
            return loaded;
        }
        catch (Error const& error) // code of a later CUDA than the driver's, say
        {
            refused = error.what();
        }
    }
    throw Error(std::string{kernel.name} + " does not run on this GPU, sm_" + number + " ("
        + (refused.empty() ? "it was built for others" : refused) + "); lvlm-build plugins --arch "
        + number);
}

} // namespace

LoadedKernel load(Kernel const& kernel)
{
    static std::mutex mutex;
    static std::map<std::pair<unsigned long long, Kernel const*>, LoadedKernel> loaded;
    Driver const& driver = Driver::get();
    CUcontext context{};
    driver.check(driver.cuCtxGetCurrent(&context), "current context");
    if (!context)
    {
        throw Error("no CUDA context is current on this thread");
    }
    // An address may come again after a device was reset; a number does not.
    unsigned long long key = reinterpret_cast<uintptr_t>(context);
    if (driver.contextId)
    {
        driver.check(driver.contextId(context, &key), "current context");
    }
    std::lock_guard<std::mutex> const lock(mutex);
    auto const found = loaded.find({key, &kernel});
    if (found != loaded.end())
    {
        return found->second;
    }
    return loaded[{key, &kernel}] = loadBest(driver, kernel);
}

void launch(LoadedKernel const& kernel, std::array<int64_t, 3> const& grid,
    std::vector<void*> const& arguments, CUstream stream)
{
    if (grid[0] > kMOST_X || grid[1] > kMOST_YZ || grid[2] > kMOST_YZ)
    {
        throw Error(std::string{kernel.image->entry} + ": a grid of " + std::to_string(grid[0]) + " x "
            + std::to_string(grid[1]) + " x " + std::to_string(grid[2])
            + " blocks is too large; make batches or sequences smaller");
    }
    std::vector<void*> parameters = arguments;
    void* nothing = nullptr; // for scratch pointers that Triton declares and no kernel uses
    parameters.resize(arguments.size() + kernel.image->extras, &nothing);
    Driver const& driver = Driver::get();
    driver.check(driver.cuLaunchKernel(kernel.function, static_cast<unsigned>(grid[0]),
                     static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2]),
                     kernel.image->threads, 1, 1, kernel.image->shared, stream, parameters.data(),
                     nullptr),
        kernel.image->entry);
}

} // namespace lvlm
