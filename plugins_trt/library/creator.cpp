// Creators, by which TensorRT finds the plugins: one for every table.

#include "log.h"
#include "plugin.h"

#include <memory>

namespace lvlm
{
namespace
{

class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit Creator(PluginTable const& table)
        : mTable(table)
        , mNames(fieldNames(table))
        , mCollection{static_cast<int32_t>(mNames.size()), mNames.data()}
    {
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const*,
        nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded(mTable.name, static_cast<nvinfer1::IPluginV3*>(nullptr), [&] {
            auto plugin = std::make_unique<Plugin>(mTable, readFields(mTable, fields));
            log(nvinfer1::ILogger::Severity::kVERBOSE, mTable.name,
                "created with " + plugin->description());
            return plugin.release();
        });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mTable.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

private:
    PluginTable const& mTable;
    std::vector<nvinfer1::PluginField> mNames;
    nvinfer1::PluginFieldCollection mCollection;
};

std::vector<nvinfer1::IPluginCreatorInterface*> const& creators()
{
    static std::vector<std::unique_ptr<Creator>> const owned = []
    {
        std::vector<std::unique_ptr<Creator>> made;
        for (PluginTable const& table : kPlugins)
        {
            made.push_back(std::make_unique<Creator>(table));
        }
        return made;
    }();
    static std::vector<nvinfer1::IPluginCreatorInterface*> const pointers = []
    {
        std::vector<nvinfer1::IPluginCreatorInterface*> listed;
        for (auto const& creator : owned)
        {
            listed.push_back(creator.get());
        }
        return listed;
    }();
    return pointers;
}

} // namespace
} // namespace lvlm

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(int32_t& nbCreators)
{
    return lvlm::guarded("library", static_cast<nvinfer1::IPluginCreatorInterface* const*>(nullptr),
        [&] {
            auto const& all = lvlm::creators();
            nbCreators = static_cast<int32_t>(all.size());
            return all.data();
        });
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(
    nvinfer1::ILoggerFinder* finder)
{
    lvlm::setFinder(finder);
}
