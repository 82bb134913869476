#include "attributes.h"

#include "log.h"

#include <cstring>

namespace lvlm
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

template <typename T>
T only(PluginField const& field)
{
    T value;
    std::memcpy(&value, field.data, sizeof value);
    return value;
}

std::string listed(List<char const*> const& words)
{
    std::string text;
    for (char const* word : words)
    {
        text += (text.empty() ? "" : ", ") + std::string{word};
    }
    return text;
}

int32_t readInt(AttributeTable const& attribute, PluginField const& field)
{
    bool const isInt32 = field.type == PluginFieldType::kINT32;
    if ((!isInt32 && field.type != PluginFieldType::kINT64) || field.length != 1)
    {
        throw Error(std::string{attribute.name} + " must be one integer, int32 or int64");
    }
    int64_t const value = isInt32 ? only<int32_t>(field) : only<int64_t>(field);
    if (value < attribute.minimum || value > INT32_MAX)
    {
        throw Error(std::string{attribute.name} + " is " + std::to_string(value) + "; "
            + std::to_string(value > INT32_MAX ? INT32_MAX : attribute.minimum) + " is the "
            + (value > INT32_MAX ? "largest" : "smallest") + " that is allowed");
    }
    return static_cast<int32_t>(value);
}

float readFloat(AttributeTable const& attribute, PluginField const& field)
{
    if (field.length == 1 && field.type == PluginFieldType::kFLOAT32)
    {
        return only<float>(field);
    }
    if (field.length == 1 && field.type == PluginFieldType::kFLOAT64)
    {
        return static_cast<float>(only<double>(field));
    }
    throw Error(std::string{attribute.name} + " must be one number, float32 or float64");
}

std::string readText(AttributeTable const& attribute, PluginField const& field)
{
    if (field.type != PluginFieldType::kCHAR || field.length < 0)
    {
        throw Error(std::string{attribute.name} + " must be a word (char)");
    }
    std::string word(static_cast<char const*>(field.data), field.length);
    word.erase(word.find_last_not_of('\0') + 1); // the parser counts the zero at the end
    for (char const* known : attribute.words)
    {
        if (word == known)
        {
            return word;
        }
    }
    if (attribute.words.count)
    {
        throw Error(std::string{attribute.name} + " is '" + word + "'; known: "
            + listed(attribute.words));
    }
    return word;
}

PluginFieldType typeOf(Kind kind)
{
    return kind == Kind::kInt ? PluginFieldType::kINT32
        : kind == Kind::kFloat ? PluginFieldType::kFLOAT32
                               : PluginFieldType::kCHAR;
}

} // namespace

Values readFields(PluginTable const& table, nvinfer1::PluginFieldCollection const* fields)
{
    Values values;
    std::vector<bool> given(table.attributes.count);
    for (AttributeTable const& attribute : table.attributes)
    {
        values.push_back({attribute.whole, attribute.real, attribute.text});
    }
    int32_t const count = fields ? fields->nbFields : 0;
    if (count > 0 && !fields->fields)
    {
        throw Error("the attributes are a null pointer");
    }
    for (int32_t i = 0; i < count; ++i)
    {
        PluginField const& field = fields->fields[i];
        std::string const name = field.name ? field.name : "";
        int32_t place = 0;
        while (place < table.attributes.count && name != table.attributes[place].name)
        {
            ++place;
        }
        if (place == table.attributes.count)
        {
            throw Error("unknown attribute '" + name + "'");
        }
        AttributeTable const& attribute = table.attributes[place];
        if (given[place])
        {
            throw Error(name + " is given twice");
        }
        if (!field.data)
        {
            throw Error(name + " has no data");
        }
        given[place] = true;
        switch (attribute.kind)
        {
        case Kind::kInt: values[place].whole = readInt(attribute, field); break;
        case Kind::kFloat: values[place].real = readFloat(attribute, field); break;
        case Kind::kText: values[place].text = readText(attribute, field); break;
        }
    }
    for (int32_t i = 0; i < table.attributes.count; ++i)
    {
        if (table.attributes[i].required && !given[i])
        {
            throw Error(std::string{"needs the attribute "} + table.attributes[i].name);
        }
    }
    return values;
}

std::vector<PluginField> writeFields(PluginTable const& table, Values const& values)
{
    std::vector<PluginField> fields = fieldNames(table);
    for (int32_t i = 0; i < table.attributes.count; ++i)
    {
        switch (table.attributes[i].kind)
        {
        case Kind::kInt: fields[i].data = &values[i].whole; break;
        case Kind::kFloat: fields[i].data = &values[i].real; break;
        case Kind::kText:
            fields[i].data = values[i].text.data();
            fields[i].length = static_cast<int32_t>(values[i].text.size());
            break;
        }
    }
    return fields;
}

std::vector<PluginField> fieldNames(PluginTable const& table)
{
    std::vector<PluginField> fields;
    for (AttributeTable const& attribute : table.attributes)
    {
        fields.emplace_back(attribute.name, nullptr, typeOf(attribute.kind), 1);
    }
    return fields;
}

int32_t wordOf(PluginTable const& table, Values const& values)
{
    if (table.variant < 0)
    {
        return 0;
    }
    List<char const*> const& words = table.attributes[table.variant].words;
    int32_t word = 0;
    while (values[table.variant].text != words[word]) // readFields() took only these
    {
        ++word;
    }
    return word;
}

std::string describe(PluginTable const& table, Values const& values)
{
    std::string text;
    for (int32_t i = 0; i < table.attributes.count; ++i)
    {
        AttributeTable const& attribute = table.attributes[i];
        text += (i ? " " : "") + std::string{attribute.name} + "="
            + (attribute.kind == Kind::kInt       ? std::to_string(values[i].whole)
                    : attribute.kind == Kind::kFloat ? std::to_string(values[i].real)
                                                     : values[i].text);
    }
    return text;
}

} // namespace lvlm
