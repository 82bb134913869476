// The case that the harness is asked to run: a text file, a line for each thing.
//
//   op CacheCompact
//   field mode char evict            types char, int32, int64, float32, float64 (several: 1,2), null
//   input key float16 2,4,9,32 FILE  raw numbers, row by row; - for FILE: shapes and types alone
//   traffic 123456                   bytes that are read and written at least, for --time
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace harness
{

struct Field
{
    std::string name;
    nvinfer1::PluginFieldType type;
    std::vector<char> data; // of `length` items
    int32_t length;
    bool null;
};

struct Input
{
    std::string name;
    nvinfer1::DataType type;
    nvinfer1::Dims dims;
    std::string file; // empty: none
};

struct Case
{
    std::string path;
    std::string op;
    std::vector<Field> fields;
    std::vector<Input> inputs;
    size_t traffic;
};

// Throws lvlm::Error for a file that cannot be read.
Case readCase(std::string const& path);

char const* nameOf(nvinfer1::DataType type);
size_t bytesOf(nvinfer1::DataType type, nvinfer1::Dims const& dims);

} // namespace harness
