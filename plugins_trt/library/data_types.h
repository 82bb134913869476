// Types of the plugins' tables, as TensorRT's and in bytes.
#pragma once

#include "tables.h"

#include <NvInferRuntime.h>

#include <cstddef>

namespace lvlm
{

// Throws for kData, as does elementBytes.
nvinfer1::DataType translated(Type type);

// kData for a type that data cannot be.
Type dataTypeOf(nvinfer1::DataType type);

// The table's type where the call's data has type `data`.
nvinfer1::DataType resolved(Type type, Type data);

size_t elementBytes(Type type);

} // namespace lvlm
