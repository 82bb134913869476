#include "data_types.h"

#include "log.h"

namespace lvlm
{

using nvinfer1::DataType;

DataType translated(Type type)
{
    switch (type)
    {
    case Type::kFloat32: return DataType::kFLOAT;
    case Type::kFloat16: return DataType::kHALF;
    case Type::kBFloat16: return DataType::kBF16;
    case Type::kInt64: return DataType::kINT64;
    case Type::kInt32: return DataType::kINT32;
    case Type::kInt8: return DataType::kINT8;
    case Type::kData: break;
    }
    throw Error("the type of the data is not known");
}

Type dataTypeOf(DataType type)
{
    for (Type known : {Type::kFloat32, Type::kFloat16, Type::kBFloat16})
    {
        if (translated(known) == type)
        {
            return known;
        }
    }
    return Type::kData;
}

DataType resolved(Type type, Type data)
{
    return translated(type == Type::kData ? data : type);
}

size_t elementBytes(Type type)
{
    switch (type)
    {
    case Type::kInt64: return 8;
    case Type::kFloat32:
    case Type::kInt32: return 4;
    case Type::kFloat16:
    case Type::kBFloat16: return 2;
    case Type::kInt8: return 1;
    case Type::kData: break;
    }
    throw Error("the type of the data is not known");
}

} // namespace lvlm
