// TensorRT's dimension expressions, for the harness: every expression has its number.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <vector>

namespace harness
{

class ExpressionBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder
{
public:
    ExpressionBuilder();
    ~ExpressionBuilder() noexcept override;

    nvinfer1::IDimensionExpr const* constant(int64_t value) override;
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op,
        nvinfer1::IDimensionExpr const& first, nvinfer1::IDimensionExpr const& second) override;
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t outputIndex,
        nvinfer1::IDimensionExpr const& opt, nvinfer1::IDimensionExpr const& upper) override;

private:
    class Expression;
    std::vector<std::unique_ptr<Expression>> mOwned;
};

} // namespace harness
