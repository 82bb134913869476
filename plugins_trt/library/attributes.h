// A plugin's attributes: read from fields (of a node, a caller, an engine) and written as fields.
#pragma once

#include "tables.h"

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace lvlm
{

struct Value
{
    int32_t whole{};
    float real{};
    std::string text;
};

// One value per attribute of the table.
using Values = std::vector<Value>;

// Throws Error for a field that is unknown, missing, of another type, or out of its range.
Values readFields(PluginTable const& table, nvinfer1::PluginFieldCollection const* fields);

// Fields that readFields() gives back as they were. They point into `values`.
std::vector<nvinfer1::PluginField> writeFields(PluginTable const& table, Values const& values);

// The fields by name and type alone.
std::vector<nvinfer1::PluginField> fieldNames(PluginTable const& table);

// Place of the variant attribute's word in the table, 0 without one.
int32_t wordOf(PluginTable const& table, Values const& values);

// "mode=evict sinks=1"
std::string describe(PluginTable const& table, Values const& values);

} // namespace lvlm
