// Messages to TensorRT's logger, and the error that everything here throws.
#pragma once

#include <NvInferRuntime.h>

#include <stdexcept>
#include <string>

namespace lvlm
{

// One line that says what is wrong and how to mend it. Caught where TensorRT calls us.
struct Error : std::runtime_error
{
    using std::runtime_error::runtime_error;
};

// Where there is no logger, errors and warnings go to stderr; if this is set, everything.
constexpr char const* kVERBOSE = "LVLM_PLUGINS_VERBOSE";

// What TensorRT gives a library that it loads. Without it, or from another major version of TensorRT
// than the headers are of, there is no logger.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void log(nvinfer1::ILogger::Severity severity, std::string const& plugin,
    std::string const& message) noexcept;

// What `body` returns, or `failed`, and its error in the log.
template <typename Body, typename Result>
Result guarded(char const* plugin, Result failed, Body body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        log(nvinfer1::ILogger::Severity::kERROR, plugin, error.what());
    }
    return failed;
}

} // namespace lvlm
