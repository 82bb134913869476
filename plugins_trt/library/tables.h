// The plugins' tables: plugin_plan.py's types in C++. Generated: tables.cpp, kernels.bin.
#pragma once

#include <cstdint>

namespace lvlm
{

template <typename T>
struct List
{
    T const* items;
    int32_t count;

    T const* begin() const { return items; }
    T const* end() const { return items + count; }
    T const& operator[](int32_t index) const { return items[index]; }
};

// kData: the type of the call's data, one of the three floating-point types.
enum class Type : int8_t
{
    kData,
    kFloat32,
    kFloat16,
    kBFloat16,
    kInt64,
    kInt32,
    kInt8,
};

enum class Operation : int8_t
{
    kConst,  // value
    kExtent, // of axis `value` of input `tensor`; below 0: from the end
    kNumel,  // of input `tensor`
    kAdd,
    kSub,
    kMul,
    kFloorDiv,
    kCeilDiv,
    kMax,
    kMin,
};

struct Token
{
    Operation operation;
    int32_t tensor;
    int64_t value;
};

using Size = List<Token>; // postfix

struct InputTable
{
    char const* name;
    Type type;
    uint32_t ranks; // bit r: rank r is allowed
    bool optional;
};

struct OutputTable
{
    char const* name;
    Type type;
    List<Size> shape;
    int32_t lead;  // input whose extents but the last come first, or -1
    int32_t alias; // input whose memory this is, or -1
};

struct ScratchTable
{
    Type type;
    List<Size> shape;
    uint32_t words; // bit w: it is there for word w of the variant attribute
};

enum class Kind : int8_t
{
    kInt,
    kFloat,
    kText,
};

struct AttributeTable
{
    char const* name;
    Kind kind;
    bool required;
    int32_t whole; // the default, by kind
    float real;
    char const* text;
    List<char const*> words; // the only ones allowed, if any
    int32_t minimum;
};

enum class Source : int8_t
{
    kInput,
    kOutput,
    kScratch,
    kSize,
    kAttribute,
};

struct ArgumentTable
{
    Source source;
    int32_t index;
    Size size;
};

struct Image
{
    int32_t arch;
    bool ptx;
    bool alone; // a cubin for exactly this architecture
    uint64_t offset; // in kernels.bin
    char const* entry;
    uint32_t threads;
    uint32_t shared;
    int32_t extras; // null pointers after the arguments
};

struct Kernel
{
    char const* name;
    List<Image> images;
};

struct Variant
{
    Type data;     // kData: any
    int64_t block; // 0: there is no choice
    Kernel const* kernel;
};

struct StepTable
{
    List<Size> grid; // up to three extents
    List<ArgumentTable> arguments;
    Size number; // that a block has to hold; empty: there is no choice
    List<Variant> variants; // blocks rise
    uint32_t words; // bit w: the step runs for word w of the variant attribute
};

struct PluginTable
{
    char const* name;
    List<InputTable> inputs;
    List<OutputTable> outputs;
    List<ScratchTable> scratch;
    List<AttributeTable> attributes;
    List<StepTable> steps;
    int32_t variant; // attribute whose word decides which steps run, or -1
    List<uint32_t> needs; // for each of its words (without: one) bit i: input i is there
};

extern List<PluginTable> const kPlugins;
extern "C" __attribute__((visibility("hidden"))) unsigned char const lvlm_kernels[];

} // namespace lvlm
