// Running a plugin on a GPU: plainly, once captured in a graph and replayed, and against the clock.
#pragma once

#include "harness_case.h"

#include <string>
#include <vector>

namespace harness
{

struct Output
{
    std::string name;
    nvinfer1::DataType type;
    nvinfer1::Dims dims;
    int32_t alias; // input whose memory TensorRT would give it, or -1
};

struct Options
{
    std::string folder; // outputs are written here
    bool raw;           // memory begins as the driver gives it, not filled with 0xFF
    int32_t repeats;    // of each measurement; 0: none
};

struct Run
{
    std::vector<uint64_t> inputs; // addresses
    std::vector<uint64_t> outputs;
    uint64_t workspace;
    std::vector<std::string> files; // of each output
    bool graphEqual;                // in a graph, in place: the same bits
    // Microseconds, medians: one enqueue of many in a row, one replay, and a copy on the device that
    // reads and writes the case's traffic
    double enqueueTime;
    double graphTime;
    double copyTime;
};

// Throws lvlm::Error if anything fails.
Run runOnDevice(nvinfer1::IPluginV3OneRuntime& plugin, Case const& asked,
    std::vector<Output> const& outputs, size_t workspace, Options const& options);

} // namespace harness
