#include "harness_plugin.h"

#include "harness_expressions.h"
#include "harness_json.h"

namespace harness
{

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

Fields fieldsOf(nvinfer1::IPluginV3& plugin)
{
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    nvinfer1::PluginFieldCollection const* fields = runtime->getFieldsToSerialize();
    Fields found;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i)
    {
        nvinfer1::PluginField const& field = fields->fields[i];
        switch (field.type)
        {
        case nvinfer1::PluginFieldType::kINT32:
            found.emplace_back(field.name, std::to_string(*static_cast<int32_t const*>(field.data)));
            break;
        case nvinfer1::PluginFieldType::kFLOAT32:
            found.emplace_back(field.name, number(*static_cast<float const*>(field.data)));
            break;
        default:
            found.emplace_back(field.name,
                quoted({static_cast<char const*>(field.data), static_cast<size_t>(field.length)}));
        }
    }
    return found;
}

Owned create(nvinfer1::IPluginCreatorV3One& creator,
    std::vector<nvinfer1::PluginField> const& fields, nvinfer1::TensorRTPhase phase)
{
    nvinfer1::PluginFieldCollection const all{static_cast<int32_t>(fields.size()), fields.data()};
    return Owned{creator.createPlugin("node", &all, phase)};
}

Owned deserialized(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin)
{
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    auto const* fields = runtime->getFieldsToSerialize();
    return Owned{creator.createPlugin("node", fields, nvinfer1::TensorRTPhase::kRUNTIME)};
}

nvinfer1::DynamicPluginTensorDesc dynamic(DataType type, nvinfer1::Dims const& dims)
{
    return {{dims, type, TensorFormat::kLINEAR, 1.0F}, dims, dims, dims};
}

std::vector<nvinfer1::DynamicPluginTensorDesc> dynamicInputs(Case const& asked)
{
    std::vector<nvinfer1::DynamicPluginTensorDesc> described;
    for (Input const& input : asked.inputs)
    {
        described.push_back(dynamic(input.type, input.dims));
    }
    return described;
}

std::optional<std::vector<Output>> outputsOf(
    nvinfer1::IPluginV3OneBuildV2& build, Case const& asked, std::vector<std::string> const& names)
{
    auto const inputs = static_cast<int32_t>(asked.inputs.size());
    int32_t const count = build.getNbOutputs();
    std::vector<DataType> inputTypes;
    std::vector<nvinfer1::DimsExprs> inputDims;
    ExpressionBuilder builder;
    for (Input const& input : asked.inputs)
    {
        inputTypes.push_back(input.type);
        nvinfer1::DimsExprs dims{};
        dims.nbDims = input.dims.nbDims;
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            dims.d[axis] = builder.constant(input.dims.d[axis]);
        }
        inputDims.push_back(dims);
    }
    std::vector<DataType> types(count);
    std::vector<nvinfer1::DimsExprs> dims(count);
    if (build.getOutputDataTypes(types.data(), count, inputTypes.data(), inputs)
        || build.getOutputShapes(inputDims.data(), inputs, nullptr, 0, dims.data(), count, builder))
    {
        return std::nullopt;
    }
    std::vector<Output> outputs;
    for (int32_t i = 0; i < count; ++i)
    {
        Output output{names[i], types[i], {}, build.getAliasedInput(i)};
        output.dims.nbDims = dims[i].nbDims;
        for (int32_t axis = 0; axis < dims[i].nbDims; ++axis)
        {
            output.dims.d[axis] = dims[i].d[axis]->getConstantValue();
        }
        outputs.push_back(output);
    }
    return outputs;
}

namespace
{

void combine(nvinfer1::IPluginV3OneBuild& build,
    std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors, size_t place, int32_t inputs,
    std::vector<std::vector<std::string>>& found)
{
    if (place == tensors.size())
    {
        found.emplace_back();
        for (auto const& tensor : tensors)
        {
            bool const linear = tensor.desc.format == TensorFormat::kLINEAR;
            found.back().push_back(std::string{nameOf(tensor.desc.type)} + (linear ? "" : " other"));
        }
        return;
    }
    for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT64,
             DataType::kINT32, DataType::kINT8, DataType::kBOOL})
    {
        for (TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8,
                 TensorFormat::kCHW32})
        {
            tensors[place].desc.type = type;
            tensors[place].desc.format = format;
            auto const outputs = static_cast<int32_t>(tensors.size()) - inputs;
            if (build.supportsFormatCombination(
                    static_cast<int32_t>(place), tensors.data(), inputs, outputs))
            {
                combine(build, tensors, place + 1, inputs, found);
            }
        }
    }
}

} // namespace

std::vector<std::vector<std::string>> formatsOf(nvinfer1::IPluginV3OneBuild& build,
    std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors, int32_t inputs)
{
    std::vector<std::vector<std::string>> found;
    combine(build, tensors, 0, inputs, found);
    return found;
}

} // namespace harness
