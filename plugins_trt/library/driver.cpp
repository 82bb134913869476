#include "driver.h"

#include "log.h"

#include <dlfcn.h>

namespace lvlm
{

void* cudaSymbol(char const* name)
{
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
    {
        throw Error("libcuda.so.1 cannot be loaded: there is no CUDA driver on this machine");
    }
    return dlsym(library, name);
}

Driver const& Driver::get()
{
    static Driver const found = []
    {
        Driver driver{};
        LVLM_CUDA_FUNCTIONS(LVLM_CUDA_FIND)
        driver.contextId = reinterpret_cast<decltype(contextId)>(cudaSymbol("cuCtxGetId"));
        driver.loadFunction = reinterpret_cast<decltype(loadFunction)>(cudaSymbol("cuFuncLoad"));
        return driver;
    }();
    return found;
}

void Driver::check(CUresult result, char const* doing) const
{
    if (result != CUDA_SUCCESS)
    {
        char const* text = nullptr;
        cuGetErrorString(result, &text);
        throw Error(std::string{"CUDA, "} + doing + ": " + (text ? text : "unknown error"));
    }
}

} // namespace lvlm
