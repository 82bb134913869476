#include "harness_case.h"

#include "log.h"

#include <fstream>
#include <sstream>
#include <utility>

namespace harness
{
namespace
{

using lvlm::Error;
using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

struct DataTypeName
{
    DataType type;
    char const* name;
    size_t bytes;
};

constexpr DataTypeName kTYPES[]{
    {DataType::kFLOAT, "float32", 4},
    {DataType::kHALF, "float16", 2},
    {DataType::kBF16, "bfloat16", 2},
    {DataType::kINT64, "int64", 8},
    {DataType::kINT32, "int32", 4},
    {DataType::kINT8, "int8", 1},
    {DataType::kBOOL, "bool", 1},
};

DataType typeNamed(std::string const& name)
{
    for (DataTypeName const& known : kTYPES)
    {
        if (name == known.name)
        {
            return known.type;
        }
    }
    throw Error("no type " + name);
}

nvinfer1::Dims dimsOf(std::string const& text)
{
    nvinfer1::Dims dims{};
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');)
    {
        if (dims.nbDims == nvinfer1::Dims::MAX_DIMS)
        {
            throw Error("too many axes: " + text);
        }
        dims.d[dims.nbDims++] = std::stoll(part);
    }
    return dims;
}

template <typename T>
void append(Field& field, T value)
{
    auto const* bytes = reinterpret_cast<char const*>(&value);
    field.data.insert(field.data.end(), bytes, bytes + sizeof value);
    ++field.length;
}

Field fieldOf(std::string const& name, std::string const& type, std::string const& value)
{
    Field field{name, PluginFieldType::kCHAR, {}, 0, type == "null"};
    if (type == "char")
    {
        field.data.assign(value.begin(), value.end());
        field.length = static_cast<int32_t>(value.size());
        field.data.push_back('?'); // not a part of it
        return field;
    }
    std::istringstream stream(value);
    for (std::string part; std::getline(stream, part, ',');)
    {
        if (type == "int32")
        {
            field.type = PluginFieldType::kINT32;
            append(field, static_cast<int32_t>(std::stol(part)));
        }
        else if (type == "int64")
        {
            field.type = PluginFieldType::kINT64;
            append(field, static_cast<int64_t>(std::stoll(part)));
        }
        else if (type == "float32")
        {
            field.type = PluginFieldType::kFLOAT32;
            append(field, std::stof(part));
        }
        else if (type == "float64")
        {
            field.type = PluginFieldType::kFLOAT64;
            append(field, std::stod(part));
        }
        else if (type != "null")
        {
            throw Error("no type " + type + " of fields");
        }
    }
    return field;
}

} // namespace

Case readCase(std::string const& path)
{
    std::ifstream file(path);
    if (!file)
    {
        throw Error(path + " cannot be read");
    }
    Case found{path, {}, {}, {}, 0};
    for (std::string line; std::getline(file, line);)
    {
        std::istringstream words(line);
        std::string what;
        std::string name;
        words >> what >> name;
        if (what == "op")
        {
            found.op = name;
        }
        else if (what == "traffic")
        {
            found.traffic = std::stoull(name);
        }
        else if (what == "field")
        {
            std::string type;
            std::string value;
            words >> type;
            std::getline(words >> std::ws, value);
            found.fields.push_back(fieldOf(name, type, value));
        }
        else if (what == "input")
        {
            std::string type;
            std::string dims;
            std::string data;
            words >> type >> dims;
            std::getline(words >> std::ws, data);
            found.inputs.push_back({name, typeNamed(type), dimsOf(dims), data == "-" ? "" : data});
        }
        else if (!what.empty())
        {
            throw Error(path + ": what is '" + line + "'?");
        }
    }
    return found;
}

char const* nameOf(DataType type)
{
    for (DataTypeName const& known : kTYPES)
    {
        if (type == known.type)
        {
            return known.name;
        }
    }
    return "other";
}

size_t bytesOf(DataType type, nvinfer1::Dims const& dims)
{
    size_t total = 0;
    for (DataTypeName const& known : kTYPES)
    {
        total = type == known.type ? known.bytes : total;
    }
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        total *= static_cast<size_t>(dims.d[i]);
    }
    return total;
}

} // namespace harness
