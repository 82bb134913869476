// ONNX Runtime's C interface, as much of it as custom ops need. Its packages ship no headers; functions
// are found by their place in the table OrtApi, to which versions only append (c_library.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lvlm {

constexpr uint32_t kApiVersion = 17;  // the first with all that is below

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorInfo;

enum class Element : int {
    kFloat = 1, kByte = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBool = 9, kHalf = 10
};

struct OrtApiBase {
    const void* const* (*get_api)(uint32_t version);
    const char* (*version)();
};

// What a custom op is to ONNX Runtime, of version 17: pointers to functions that get this object.
struct OrtCustomOp {
    uint32_t version;
    void* (*create_kernel)(const OrtCustomOp*, const void* const*, const OrtKernelInfo*);
    const char* (*name)(const OrtCustomOp*);
    const char* (*provider)(const OrtCustomOp*);
    Element (*input_type)(const OrtCustomOp*, size_t);
    size_t (*input_count)(const OrtCustomOp*);
    Element (*output_type)(const OrtCustomOp*, size_t);
    size_t (*output_count)(const OrtCustomOp*);
    void (*compute)(void*, OrtKernelContext*);
    void (*destroy)(void*);
    int (*input_kind)(const OrtCustomOp*, size_t);  // 0 required, 1 optional
    int (*output_kind)(const OrtCustomOp*, size_t);
    int (*input_memory)(const OrtCustomOp*, size_t);
    int (*variadic_input_minimum)(const OrtCustomOp*);
    int (*variadic_input_homogeneous)(const OrtCustomOp*);
    int (*variadic_output_minimum)(const OrtCustomOp*);
    int (*variadic_output_homogeneous)(const OrtCustomOp*);
    OrtStatus* (*create_kernel_v2)(const OrtCustomOp*, const void* const*, const OrtKernelInfo*, void**);
    OrtStatus* (*compute_v2)(void*, OrtKernelContext*);
    OrtStatus* (*infer_shapes)(const OrtCustomOp*, void*);
    int (*start_version)(const OrtCustomOp*);
    int (*end_version)(const OrtCustomOp*);
};

// The functions of the table that are used here.
class OrtApi {
public:
    explicit OrtApi(const void* const* table)
        : create_status(at<OrtStatus*(int, const char*)>(table, 0)),
          error_message(at<const char*(const OrtStatus*)>(table, 2)),
          create_domain(at<OrtStatus*(const char*, OrtCustomOpDomain**)>(table, 26)),
          add_to_domain(at<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(table, 27)),
          add_domain(at<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(table, 28)),
          tensor_data(at<OrtStatus*(OrtValue*, void**)>(table, 51)),
          rank(at<OrtStatus*(const OrtTensorInfo*, size_t*)>(table, 61)),
          dims(at<OrtStatus*(const OrtTensorInfo*, int64_t*, size_t)>(table, 62)),
          tensor_info(at<OrtStatus*(const OrtValue*, OrtTensorInfo**)>(table, 65)),
          float_attribute(at<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(table, 85)),
          int_attribute(at<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(table, 86)),
          string_attribute(
              at<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>(table, 87)),
          input_count(at<OrtStatus*(const OrtKernelContext*, size_t*)>(table, 88)),
          output_count(at<OrtStatus*(const OrtKernelContext*, size_t*)>(table, 89)),
          input(at<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(table, 90)),
          output(at<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(
              table, 91)),
          release_status(at<void(OrtStatus*)>(table, 93)),
          release_info(at<void(OrtTensorInfo*)>(table, 99)),
          constant_input(
              at<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(table, 249)),
          parallel_for(
              at<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
                  table, 274)) {}

private:
    template <class F>
    static F* at(const void* const* table, size_t place) {
        return reinterpret_cast<F*>(const_cast<void*>(table[place]));
    }

public:
    OrtStatus* (*create_status)(int, const char*);
    const char* (*error_message)(const OrtStatus*);
    OrtStatus* (*create_domain)(const char*, OrtCustomOpDomain**);
    OrtStatus* (*add_to_domain)(OrtCustomOpDomain*, const OrtCustomOp*);
    OrtStatus* (*add_domain)(OrtSessionOptions*, OrtCustomOpDomain*);
    OrtStatus* (*tensor_data)(OrtValue*, void**);
    OrtStatus* (*rank)(const OrtTensorInfo*, size_t*);
    OrtStatus* (*dims)(const OrtTensorInfo*, int64_t*, size_t);
    OrtStatus* (*tensor_info)(const OrtValue*, OrtTensorInfo**);
    OrtStatus* (*float_attribute)(const OrtKernelInfo*, const char*, float*);
    OrtStatus* (*int_attribute)(const OrtKernelInfo*, const char*, int64_t*);
    OrtStatus* (*string_attribute)(const OrtKernelInfo*, const char*, char*, size_t*);
    OrtStatus* (*input_count)(const OrtKernelContext*, size_t*);
    OrtStatus* (*output_count)(const OrtKernelContext*, size_t*);
    OrtStatus* (*input)(const OrtKernelContext*, size_t, const OrtValue**);
    OrtStatus* (*output)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
    void (*release_status)(OrtStatus*);
    void (*release_info)(OrtTensorInfo*);
    OrtStatus* (*constant_input)(const OrtKernelInfo*, size_t, int*, const OrtValue**);
    OrtStatus* (*parallel_for)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
};

}  // namespace lvlm
