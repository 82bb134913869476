#include "sizes.h"

#include "log.h"

#include <algorithm>

namespace lvlm
{
namespace
{

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

// Runs the postfix form; Calculator knows numbers or expressions.
template <typename Calculator, typename Dims>
auto run(Size const& size, std::vector<Dims const*> const& shapes, Calculator const& calculate)
{
    std::vector<decltype(calculate.constant(0))> stack;
    for (Token const& token : size)
    {
        if (token.operation == Operation::kConst)
        {
            stack.push_back(calculate.constant(token.value));
        }
        else if (token.operation == Operation::kExtent || token.operation == Operation::kNumel)
        {
            Dims const* dims = shapes.at(token.tensor);
            if (!dims)
            {
                throw Error("a size depends on an input that is not there");
            }
            int64_t const axis = token.value < 0 ? token.value + dims->nbDims : token.value;
            if (token.operation == Operation::kNumel)
            {
                auto total = calculate.constant(1);
                for (int32_t i = 0; i < dims->nbDims; ++i)
                {
                    total = calculate.operation(Operation::kMul, total, dims->d[i]);
                }
                stack.push_back(total);
            }
            else if (axis < 0 || axis >= dims->nbDims)
            {
                throw Error("a size depends on an axis that an input has not");
            }
            else
            {
                stack.push_back(dims->d[axis]);
            }
        }
        else
        {
            auto const second = stack.back();
            stack.pop_back();
            stack.back() = calculate.operation(token.operation, stack.back(), second);
        }
    }
    return stack.back();
}

struct Numbers
{
    int64_t constant(int64_t value) const { return value; }

    int64_t operation(Operation operation, int64_t first, int64_t second) const
    {
        bool const divides = operation == Operation::kFloorDiv || operation == Operation::kCeilDiv;
        if (divides && second == 0)
        {
            throw Error("a size is divided by an extent of 0");
        }
        switch (operation)
        {
        case Operation::kAdd: return first + second;
        case Operation::kSub: return first - second;
        case Operation::kMul: return first * second;
        case Operation::kFloorDiv: return first / second;
        case Operation::kCeilDiv: return (first + second - 1) / second;
        case Operation::kMax: return std::max(first, second);
        case Operation::kMin: return std::min(first, second);
        default: throw Error("an operation of no number");
        }
    }
};

struct Expressions
{
    nvinfer1::IExprBuilder& builder;

    IDimensionExpr const* constant(int64_t value) const { return builder.constant(value); }

    IDimensionExpr const* operation(
        Operation operation, IDimensionExpr const* first, IDimensionExpr const* second) const
    {
        return builder.operation(translated(operation), *first, *second);
    }

    static DimensionOperation translated(Operation operation)
    {
        switch (operation)
        {
        case Operation::kAdd: return DimensionOperation::kSUM;
        case Operation::kSub: return DimensionOperation::kSUB;
        case Operation::kMul: return DimensionOperation::kPROD;
        case Operation::kFloorDiv: return DimensionOperation::kFLOOR_DIV;
        case Operation::kCeilDiv: return DimensionOperation::kCEIL_DIV;
        case Operation::kMax: return DimensionOperation::kMAX;
        case Operation::kMin: return DimensionOperation::kMIN;
        default: throw Error("an operation of no number");
        }
    }
};

} // namespace

int64_t evaluate(Size const& size, Shapes const& shapes)
{
    return run(size, shapes, Numbers{});
}

IDimensionExpr const* express(
    Size const& size, ShapeExpressions const& shapes, nvinfer1::IExprBuilder& builder)
{
    auto const* result = run(size, shapes, Expressions{builder});
    if (!result)
    {
        throw Error("TensorRT makes no expression of an output's extent");
    }
    return result;
}

} // namespace lvlm
