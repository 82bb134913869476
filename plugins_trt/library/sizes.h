// Sizes (sizes.py): with numbers when a plugin runs, with TensorRT's expressions while it builds.
#pragma once

#include "tables.h"

#include <NvInferRuntime.h>

#include <vector>

namespace lvlm
{

// Extents of every input of the table; null for one that is not there.
using Shapes = std::vector<nvinfer1::Dims const*>;
using ShapeExpressions = std::vector<nvinfer1::DimsExprs const*>;

// Throw Error for an input that is not there, an axis that it has not, a division by zero.
int64_t evaluate(Size const& size, Shapes const& shapes);
nvinfer1::IDimensionExpr const* express(
    Size const& size, ShapeExpressions const& shapes, nvinfer1::IExprBuilder& builder);

} // namespace lvlm
