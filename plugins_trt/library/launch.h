// Kernels of the tables on the current GPU: the right image, loaded once per context, launched.
#pragma once

#include "driver.h"
#include "tables.h"

#include <array>
#include <vector>

namespace lvlm
{

struct LoadedKernel
{
    CUfunction function;
    Image const* image;
};

// The kernel, ready to be launched in the current context. Throws Error if no image of it runs on
// this GPU. Any thread; what is loaded stays until the process ends.
LoadedKernel load(Kernel const& kernel);

// Grid extents are from 1 up. Throws Error for a grid that is too large, and for the driver's.
void launch(LoadedKernel const& kernel, std::array<int64_t, 3> const& grid,
    std::vector<void*> const& arguments, CUstream stream);

} // namespace lvlm
