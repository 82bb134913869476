#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace lvlm
{
namespace
{

using GlobalLogger = nvinfer1::ILogger* (*) ();

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};
std::atomic<GlobalLogger> gGlobal{nullptr};

// A function of the library that an object is in; null if it has none.
template <typename Function>
Function exported(void const* object, char const* name)
{
    Dl_info library{};
    if (!dladdr(object, &library) || !library.dli_fname)
    {
        return nullptr;
    }
    void* const handle = dlopen(library.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    return handle ? reinterpret_cast<Function>(dlsym(handle, name)) : nullptr;
}

// Of the engine that calls us; else, as while a model is parsed, the process's. May be null.
nvinfer1::ILogger* logger()
{
    auto* const finder = gFinder.load();
    auto* const found = finder ? finder->findLogger() : nullptr;
    auto* const global = gGlobal.load();
    return found || !global ? found : global();
}

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder = nullptr;
    gGlobal = nullptr;
    if (!finder)
    {
        return;
    }
    void const* const functions = *reinterpret_cast<void**>(finder); // virtual, in its library
    auto* const major = exported<int32_t (*)()>(functions, "getInferLibMajorVersion");
    if (major && major() != NV_TENSORRT_MAJOR) // its loggers are other classes than ours
    {
        return;
    }
    gGlobal = exported<GlobalLogger>(functions, "getLogger");
    gFinder = finder;
}

void log(nvinfer1::ILogger::Severity severity, std::string const& plugin,
    std::string const& message) noexcept
{
    try
    {
        std::string const line = "lvlm " + plugin + ": " + message;
        if (auto* const found = logger())
        {
            found->log(severity, line.c_str());
        }
        else if (severity <= nvinfer1::ILogger::Severity::kWARNING || std::getenv(kVERBOSE))
        {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    }
    catch (std::exception const&)
    {
        // No memory for a message: there is nobody to tell.
    }
}

} // namespace lvlm
