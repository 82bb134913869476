// A plugin as TensorRT asks it when an engine is built.
#pragma once

#include "harness_case.h"
#include "harness_device.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace harness
{

using Fields = std::vector<std::pair<std::string, std::string>>; // name, value in JSON
using Owned = std::unique_ptr<nvinfer1::IPluginV3>;

// What the plugin serializes.
Fields fieldsOf(nvinfer1::IPluginV3& plugin);

Owned create(nvinfer1::IPluginCreatorV3One& creator,
    std::vector<nvinfer1::PluginField> const& fields, nvinfer1::TensorRTPhase phase);

// Made of what the plugin serializes, as an engine that is read.
Owned deserialized(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin);

nvinfer1::DynamicPluginTensorDesc dynamic(nvinfer1::DataType type, nvinfer1::Dims const& dims);
std::vector<nvinfer1::DynamicPluginTensorDesc> dynamicInputs(Case const& asked);

// The outputs, or nothing if the plugin refuses these inputs.
std::optional<std::vector<Output>> outputsOf(
    nvinfer1::IPluginV3OneBuildV2& build, Case const& asked, std::vector<std::string> const& names);

// Every combination of types that the plugin supports, found as TensorRT does: tensor by tensor.
std::vector<std::vector<std::string>> formatsOf(nvinfer1::IPluginV3OneBuild& build,
    std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors, int32_t inputs);

} // namespace harness
