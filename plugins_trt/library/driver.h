// The CUDA driver's functions, found in libcuda.so.1 when they are first needed, so that the library
// loads where there is no driver.
#pragma once

#include <cuda.h>

// Names, and what the driver adds to them: cuda.h of a later CUDA may want a later function, which
// an older driver has not.
#define LVLM_CUDA_FUNCTIONS(F)                                                                     \
    F(cuCtxGetCurrent, "")                                                                         \
    F(cuCtxGetDevice, "")                                                                          \
    F(cuDeviceGetAttribute, "")                                                                    \
    F(cuModuleLoadData, "")                                                                        \
    F(cuModuleUnload, "")                                                                          \
    F(cuModuleGetFunction, "")                                                                     \
    F(cuFuncSetAttribute, "")                                                                      \
    F(cuLaunchKernel, "")                                                                          \
    F(cuMemcpyDtoDAsync, "_v2")                                                                    \
    F(cuGetErrorString, "")

#define LVLM_CUDA_MEMBER(name, suffix) decltype(&::name) name;

namespace lvlm
{

struct Driver
{
    LVLM_CUDA_FUNCTIONS(LVLM_CUDA_MEMBER)
    // Younger than the oldest cuda.h that this is written for; null where the driver has none.
    CUresult (*contextId)(CUcontext, unsigned long long*); // cuCtxGetId, CUDA 12.0
    CUresult (*loadFunction)(CUfunction);                  // cuFuncLoad, CUDA 12.4

    // Throws Error if there is no driver, or one that lacks a function.
    static Driver const& get();

    // Throws Error with what was being done, unless the driver succeeded.
    void check(CUresult result, char const* doing) const;
};

// A symbol of libcuda.so.1. Throws Error if there is no driver; null if it has no such symbol.
void* cudaSymbol(char const* name);

} // namespace lvlm

#define LVLM_CUDA_FIND(name, suffix)                                                               \
    driver.name = reinterpret_cast<decltype(&::name)>(::lvlm::cudaSymbol(#name suffix));           \
    if (!driver.name)                                                                              \
    {                                                                                              \
        throw ::lvlm::Error("the CUDA driver has no " #name suffix "; update it");                 \
    }
