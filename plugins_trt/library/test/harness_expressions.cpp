#include "harness_expressions.h"

#include <algorithm>

namespace harness
{

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

class ExpressionBuilder::Expression final : public IDimensionExpr,
                                            public nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }

    ~Expression() noexcept override = default;
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return mValue; }
    bool isSizeTensor() const override { return false; }

private:
    int64_t mValue;
};

ExpressionBuilder::ExpressionBuilder()
{
    mImpl = this;
}

ExpressionBuilder::~ExpressionBuilder() noexcept = default;

IDimensionExpr const* ExpressionBuilder::constant(int64_t value)
{
    mOwned.push_back(std::make_unique<Expression>(value));
    return mOwned.back().get();
}

IDimensionExpr const* ExpressionBuilder::operation(
    DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second)
{
    int64_t const a = first.getConstantValue();
    int64_t const b = second.getConstantValue();
    switch (op)
    {
    case DimensionOperation::kSUM: return constant(a + b);
    case DimensionOperation::kPROD: return constant(a * b);
    case DimensionOperation::kMAX: return constant(std::max(a, b));
    case DimensionOperation::kMIN: return constant(std::min(a, b));
    case DimensionOperation::kSUB: return constant(a - b);
    case DimensionOperation::kFLOOR_DIV: return constant(a / b);
    case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
    default: return nullptr;
    }
}

IDimensionExpr const* ExpressionBuilder::declareSizeTensor(
    int32_t, IDimensionExpr const&, IDimensionExpr const&)
{
    return nullptr;
}

} // namespace harness
