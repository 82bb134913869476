// Drives the plugin library as TensorRT would, without TensorRT, and says in JSON what it saw.
//
//   lvlm_plugin_harness LIBRARY [--enqueue FOLDER] [--raw] [--time REPEATS] CASE…
//
// A line of JSON for every case (harness_case.h). --enqueue runs the plugin on the GPU and writes
// outputs to FOLDER; --raw leaves memory as the driver gives it, for compute-sanitizer's initcheck;
// --time measures. The status is 1 if a file or the library cannot be read.

#include "harness_case.h"
#include "harness_device.h"
#include "harness_json.h"
#include "harness_library.h"
#include "harness_plugin.h"

#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

namespace harness
{
namespace
{

using lvlm::Error;

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
    report.add("formats", array(formatsOf(build, described, inputs),
                              [](auto const& one) { return array(one, quoted); }));
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
