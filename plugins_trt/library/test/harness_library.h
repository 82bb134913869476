// The plugin library, loaded as TensorRT loads it, and what it logs.
#pragma once

#include "log.h"

#include <dlfcn.h>

#include <string>
#include <vector>

namespace harness
{

class Log final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder
{
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override
    {
        if (severity <= Severity::kWARNING)
        {
            messages.emplace_back(message);
        }
    }
    nvinfer1::ILogger* findLogger() override { return this; }

    std::vector<std::string> messages;
};

class Library
{
public:
    explicit Library(char const* path)
    {
        void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!handle)
        {
            throw lvlm::Error(dlerror());
        }
        auto* setFinder = symbol<void (*)(nvinfer1::ILoggerFinder*)>(handle, "setLoggerFinder");
        auto* creators = symbol<nvinfer1::IPluginCreatorInterface* const* (*) (int32_t&)>(
            handle, "getCreators");
        setFinder(&log);
        mCreators = creators(mCount);
    }

    nvinfer1::IPluginCreatorV3One& creator(std::string const& op) const
    {
        for (int32_t i = 0; i < mCount; ++i)
        {
            auto* found = static_cast<nvinfer1::IPluginCreatorV3One*>(mCreators[i]);
            if (op == found->getPluginName())
            {
                return *found;
            }
        }
        throw lvlm::Error("the library has no plugin " + op);
    }

    Log log;

private:
    template <typename Function>
    static Function symbol(void* handle, char const* name)
    {
        void* const found = dlsym(handle, name);
        if (!found)
        {
            throw lvlm::Error(std::string{"the library has no "} + name);
        }
        return reinterpret_cast<Function>(found);
    }

    nvinfer1::IPluginCreatorInterface* const* mCreators{};
    int32_t mCount{};
};

} // namespace harness
