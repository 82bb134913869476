// Drives the plugin library as TensorRT would, without TensorRT, and says in JSON what it saw.
//
//   lvlm_plugin_harness LIBRARY [--enqueue FOLDER] [--raw] [--time REPEATS] CASE…
//
// A line of JSON for every case (harness_case.h). --enqueue runs the plugin on the GPU and writes
// outputs to FOLDER; --raw leaves memory as the driver gives it, for compute-sanitizer's initcheck;
// --time measures. The status is 1 if a file or the library cannot be read.

#include "harness_case.h"
#include "harness_device.h"
#include "harness_expressions.h"
#include "harness_json.h"
#include "harness_library.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

namespace harness
{
namespace
{

using lvlm::Error;
using nvinfer1::DataType;
using nvinfer1::TensorFormat;

using Fields = std::vector<std::pair<std::string, std::string>>; // name, value in JSON

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

using Owned = std::unique_ptr<nvinfer1::IPluginV3>;

Owned create(nvinfer1::IPluginCreatorV3One& creator,
    std::vector<nvinfer1::PluginField> const& fields, nvinfer1::TensorRTPhase phase)
{
    nvinfer1::PluginFieldCollection const all{static_cast<int32_t>(fields.size()), fields.data()};
    return Owned{creator.createPlugin("node", &all, phase)};
}

// Made of what the plugin serializes, as an engine that is read.
Owned deserialized(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin)
{
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    auto const* fields = runtime->getFieldsToSerialize();
    return Owned{creator.createPlugin("node", fields, nvinfer1::TensorRTPhase::kRUNTIME)};
}

// Every combination of types that the plugin supports, found as TensorRT does: tensor by tensor.
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

// The outputs, or nothing if the plugin refuses these inputs.
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

void addRun(Object& report, Run const& run, Options const& options)
{
    auto const address = [](uint64_t value) { return std::to_string(value); };
    report.add("input_memory", array(run.inputs, address));
    report.add("output_memory", array(run.outputs, address));
    report.add("workspace_memory", address(run.workspace));
    report.add("files", array(run.files, quoted));
    report.add("graph_equal", boolean(run.graphEqual));
    if (options.repeats > 0)
    {
        report.add("enqueue_us", number(run.enqueueTime));
        report.add("graph_us", number(run.graphTime));
        report.add("copy_us", number(run.copyTime));
    }
}

// All that can be asked of a plugin that was created.
void examine(Object& report, nvinfer1::IPluginCreatorV3One& creator, Owned plugin,
    Case const& asked, std::optional<Options> const& options)
{
    Fields const fields = fieldsOf(*plugin);
    Owned copy{plugin->clone()};
    Owned again = deserialized(creator, *plugin);
    plugin.reset(); // what was made of it stands alone
    Object listed;
    for (auto const& [name, value] : fields)
    {
        listed.add(name.c_str(), value);
    }
    report.add("fields", listed.done());
    report.add("clone_equal", boolean(copy && fieldsOf(*copy) == fields));
    report.add("serialized_equal", boolean(again && fieldsOf(*again) == fields));
    if (!copy || !again)
    {
        return;
    }
    auto& build = *static_cast<nvinfer1::IPluginV3OneBuildV2*>(
        copy->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
    std::vector<std::string> names;
    for (int32_t i = 0; i < build.getNbOutputs(); ++i)
    {
        names.push_back(std::to_string(i));
    }
    auto const outputs = outputsOf(build, asked, names);
    report.add("accepted", boolean(outputs.has_value()));
    if (!outputs)
    {
        return;
    }
    report.add("types", array(*outputs, [](Output const& o) { return quoted(nameOf(o.type)); }));
    report.add("shapes", array(*outputs, [](Output const& o) {
        std::vector<int64_t> const dims(o.dims.d, o.dims.d + o.dims.nbDims);
        return array(dims, [](int64_t extent) { return std::to_string(extent); });
    }));
    report.add("aliases", array(*outputs, [](Output const& o) { return std::to_string(o.alias); }));
    auto described = dynamicInputs(asked);
    auto const inputs = static_cast<int32_t>(described.size());
    for (Output const& output : *outputs)
    {
        described.push_back(dynamic(output.type, output.dims));
    }
    auto const* outputDescs = described.data() + inputs;
    auto const count = static_cast<int32_t>(outputs->size());
    bool const configured = build.configurePlugin(described.data(), inputs, outputDescs, count) == 0;
    report.add("configured", boolean(configured));
    size_t const workspace = build.getWorkspaceSize(described.data(), inputs, outputDescs, count);
    report.add("workspace", std::to_string(workspace));
    std::vector<std::vector<std::string>> formats;
    combine(build, described, 0, inputs, formats);
    report.add("formats", array(formats, [](auto const& one) { return array(one, quoted); }));
    if (options)
    {
        auto* attached = static_cast<nvinfer1::IPluginV3OneRuntime*>(
            again->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME))
                             ->attachToContext(nullptr);
        Owned const running{attached};
        auto& runtime = *static_cast<nvinfer1::IPluginV3OneRuntime*>(
            running->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
        addRun(report, runOnDevice(runtime, asked, *outputs, workspace, *options), *options);
    }
}

std::string report(Library& library, Case const& asked, std::optional<Options> const& options)
{
    Object object;
    object.add("case", quoted(asked.path));
    library.log.messages.clear();
    try
    {
        std::vector<nvinfer1::PluginField> fields;
        for (Field const& field : asked.fields)
        {
            void const* data = field.null ? nullptr : field.data.data();
            fields.emplace_back(field.name.c_str(), data, field.type, field.length);
        }
        auto& creator = library.creator(asked.op);
        Owned plugin = create(creator, fields, nvinfer1::TensorRTPhase::kBUILD);
        object.add("created", boolean(plugin != nullptr));
        if (plugin)
        {
            examine(object, creator, std::move(plugin), asked, options);
        }
    }
    catch (std::exception const& error)
    {
        object.add("error", quoted(error.what()));
    }
    object.add("log", array(library.log.messages, quoted));
    return object.done();
}

int run(int argc, char** argv)
{
    std::optional<Options> options;
    std::vector<std::string> paths;
    bool raw = false;
    int32_t repeats = 0;
    for (int i = 2; i < argc; ++i)
    {
        bool const another = i + 1 < argc;
        if (!std::strcmp(argv[i], "--enqueue") && another)
        {
            options = Options{argv[++i], false, 0};
        }
        else if (!std::strcmp(argv[i], "--raw"))
        {
            raw = true;
        }
        else if (!std::strcmp(argv[i], "--time") && another)
        {
            repeats = std::stoi(argv[++i]);
        }
        else
        {
            paths.emplace_back(argv[i]);
        }
    }
    if (options)
    {
        options->raw = raw;
        options->repeats = repeats;
    }
    if (argc < 3 || paths.empty())
    {
        throw Error("usage: lvlm_plugin_harness LIBRARY [--enqueue FOLDER] [--raw] [--time N] CASE…");
    }
    Library library(argv[1]);
    for (std::string const& path : paths)
    {
        std::printf("%s\n", report(library, readCase(path), options).c_str());
        std::fflush(stdout);
    }
    return 0;
}

} // namespace
} // namespace harness

int main(int argc, char** argv)
{
    try
    {
        return harness::run(argc, argv);
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
