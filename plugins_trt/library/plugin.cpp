#include "plugin.h"

#include "data_types.h"
#include "log.h"

#include <algorithm>
#include <utility>

namespace lvlm
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kFAILED = 1;

} // namespace

Plugin::Plugin(PluginTable const& table, Values values)
    : mTable(table)
    , mValues(std::move(values))
    , mWord(wordOf(table, mValues))
    , mDescription(describe(table, mValues))
{
    for (int32_t i = 0; i < table.inputs.count; ++i)
    {
        if (table.needs[mWord] >> i & 1U)
        {
            mPresent.push_back(i);
        }
    }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept
{
    return guarded(mTable.name, static_cast<IPluginV3*>(nullptr), [&] { return new Plugin(mTable, mValues); });
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const*, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return guarded(mTable.name, kFAILED, [&] {
        checkCounts(nbInputs, nbOutputs);
        return 0;
    });
}

int32_t Plugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
    DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded(mTable.name, kFAILED, [&] {
        checkCounts(nbInputs, nbOutputs);
        Type const data = dataType(inputTypes);
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputTypes[i] = resolved(mTable.outputs[i].type, data);
        }
        return 0;
    });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const*, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& builder) noexcept
{
    return guarded(mTable.name, kFAILED, [&] {
        checkCounts(nbInputs + nbShapeInputs, nbOutputs);
        ShapeExpressions shapes(mTable.inputs.count, nullptr);
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            checkRank(mPresent[i], inputs[i].nbDims);
            shapes[mPresent[i]] = &inputs[i];
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            OutputTable const& output = mTable.outputs[i];
            int32_t rank = 0;
            if (output.lead >= 0)
            {
                nvinfer1::DimsExprs const& lead = *shapes[output.lead];
                rank = std::max(lead.nbDims - 1, 0);
                std::copy(lead.d, lead.d + rank, outputs[i].d);
            }
            for (Size const& size : output.shape)
            {
                outputs[i].d[rank++] = express(size, shapes, builder);
            }
            outputs[i].nbDims = rank;
        }
        return 0;
    });
}

bool Plugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return guarded(mTable.name, false, [&] {
        checkCounts(nbInputs, nbOutputs);
        auto const tableType = [&](int32_t place) {
            return place < nbInputs ? mTable.inputs[mPresent[place]].type
                                    : mTable.outputs[place - nbInputs].type;
        };
        DataType const type = inOut[pos].desc.type;
        if (inOut[pos].desc.format != nvinfer1::TensorFormat::kLINEAR)
        {
            return false;
        }
        if (tableType(pos) != Type::kData)
        {
            return type == translated(tableType(pos));
        }
        for (int32_t before = 0; before < pos; ++before)
        {
            if (tableType(before) == Type::kData)
            {
                return type == inOut[before].desc.type;
            }
        }
        return dataTypeOf(type) != Type::kData;
    });
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t nbOutputs) const noexcept
{
    return guarded(mTable.name, size_t{0}, [&] {
        checkCounts(nbInputs, nbOutputs);
        size_t total = 0;
        for (size_t bytes :
            call([&](int32_t i) { return std::make_pair(inputs[i].desc.type, &inputs[i].max); })
                .scratchBytes())
        {
            total += bytes;
        }
        return total;
    });
}

int32_t Plugin::getAliasedInput(int32_t outputIndex) noexcept
{
    if (outputIndex < 0 || outputIndex >= mTable.outputs.count)
    {
        return -1;
    }
    auto const place
        = std::find(mPresent.begin(), mPresent.end(), mTable.outputs[outputIndex].alias);
    return place == mPresent.end() ? -1 : static_cast<int32_t>(place - mPresent.begin());
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
    int32_t nbOutputs) noexcept
{
    return guarded(mTable.name, kFAILED, [&] {
        checkCounts(nbInputs, nbOutputs);
        call([&](int32_t i) { return std::make_pair(in[i].type, &in[i].dims); }).load();
        return 0;
    });
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(mTable.name, kFAILED, [&] {
        Call::Memory memory;
        memory.inputs.resize(mTable.inputs.count);
        for (size_t i = 0; i < mPresent.size(); ++i)
        {
            memory.inputs[mPresent[i]] = const_cast<void*>(inputs[i]); // kernels take no const
        }
        memory.outputs.assign(outputs, outputs + mTable.outputs.count);
        memory.workspace = workspace;
        call([&](int32_t i) { return std::make_pair(inputDesc[i].type, &inputDesc[i].dims); })
            .enqueue(memory, reinterpret_cast<CUstream>(stream));
        return 0;
    });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept
{
    return guarded(
        mTable.name, static_cast<nvinfer1::PluginFieldCollection const*>(nullptr), [&] {
            mFields = writeFields(mTable, mValues);
            mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
            return &mCollection;
        });
}

template <typename Tensor>
Call Plugin::call(Tensor const& tensor) const
{
    std::vector<DataType> types;
    Shapes shapes(mTable.inputs.count, nullptr);
    for (size_t i = 0; i < mPresent.size(); ++i)
    {
        auto const [type, dims] = tensor(static_cast<int32_t>(i));
        checkRank(mPresent[i], dims->nbDims);
        types.push_back(type);
        shapes[mPresent[i]] = dims;
    }
    return {mTable, mValues, mWord, dataType(types.data()), shapes};
}

void Plugin::checkCounts(int32_t nbInputs, int32_t nbOutputs) const
{
    auto const expected = static_cast<int32_t>(mPresent.size());
    if (nbInputs != expected)
    {
        throw Error("has " + std::to_string(nbInputs) + " inputs; " + std::to_string(expected)
            + " are needed" + (mDescription.empty() ? "" : " with " + mDescription));
    }
    if (nbOutputs != mTable.outputs.count)
    {
        throw Error("has " + std::to_string(nbOutputs) + " outputs; "
            + std::to_string(mTable.outputs.count) + " are needed");
    }
}

// What kData is for these inputs.
Type Plugin::dataType(DataType const* inputs) const
{
    Type data = Type::kData;
    for (size_t i = 0; i < mPresent.size(); ++i)
    {
        InputTable const& input = mTable.inputs[mPresent[i]];
        if (input.type == Type::kData && data == Type::kData)
        {
            data = dataTypeOf(inputs[i]);
            if (data == Type::kData)
            {
                throw Error(std::string{input.name} + " must be float32, float16 or bfloat16");
            }
        }
        else if (inputs[i] != resolved(input.type, data))
        {
            throw Error(std::string{input.name}
                + (input.type == Type::kData ? " must have the type of the data before it"
                                             : " has another type than the one it must have"));
        }
    }
    return data;
}

void Plugin::checkRank(int32_t place, int32_t rank) const
{
    InputTable const& input = mTable.inputs[place];
    if (rank < 0 || rank > nvinfer1::Dims::MAX_DIMS || !(input.ranks >> rank & 1U))
    {
        throw Error(std::string{input.name} + " has " + std::to_string(rank) + " axes");
    }
}

} // namespace lvlm
