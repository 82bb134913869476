// JSON, piece by piece.
#pragma once

#include <cstdio>
#include <string>

namespace harness
{

inline std::string quoted(std::string const& text)
{
    std::string result = "\"";
    for (char const letter : text)
    {
        auto const code = static_cast<unsigned char>(letter);
        if (code < ' ')
        {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", code);
            result += escaped;
            continue;
        }
        result += letter == '"' || letter == '\\' ? "\\" : "";
        result += letter;
    }
    return result + "\"";
}

template <typename Items, typename Show>
std::string array(Items const& items, Show show)
{
    std::string result;
    for (auto const& item : items)
    {
        result += (result.empty() ? "" : ", ") + show(item);
    }
    return "[" + result + "]";
}

inline std::string number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

inline std::string boolean(bool value)
{
    return value ? "true" : "false";
}

// A JSON object, member by member.
struct Object
{
    std::string text;

    void add(char const* name, std::string const& value)
    {
        text += (text.empty() ? "" : ", ") + quoted(name) + ": " + value;
    }
    std::string done() const { return "{" + text + "}"; }
};

} // namespace harness
