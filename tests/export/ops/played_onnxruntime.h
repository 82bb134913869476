// ONNX Runtime's C interface, as much of it as ort_api.h has, played for kernel_driver.cpp. Every tensor
// is a block of its own size, and every task has a thread of its own, so that no two are in order by chance.
#pragma once

#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

#include "op.h"

namespace lvlm {

struct OrtStatus {
    std::string message;
};

struct OrtTensorInfo {
    Shape shape;
};

inline size_t bytes_of(Element type) {
    switch (type) {
        case Element::kByte:
        case Element::kBool: return 1;
        case Element::kHalf: return 2;
        case Element::kFloat:
        case Element::kInt32: return 4;
        case Element::kInt64: return 8;
    }
    std::abort();
}

struct OrtValue {
    Element type;
    Shape shape;
    std::shared_ptr<char> data;

    OrtValue(Element type, Shape shape) : type(type), shape(std::move(shape)) {
        data.reset(static_cast<char*>(std::malloc(bytes())), std::free);
        std::memset(data.get(), 0xff, bytes());  // NaN: what is not written is seen
    }
    size_t bytes() const {
        size_t count = bytes_of(type);
        for (const int64_t extent : shape) count *= extent;
        return count;
    }
    OrtValue copy() const {
        OrtValue made(type, shape);
        std::memcpy(made.data.get(), data.get(), bytes());
        return made;
    }
};

struct Input {
    std::optional<OrtValue> value;
    bool constant;
};

// What kernel_driver.py writes of an output: its type, and the input whose memory it is bound to, or -1.
struct Bound {
    Element type;
    int64_t input;
};

// A node.
struct OrtKernelInfo {
    std::string domain, name;
    std::map<std::string, float> floats;
    std::map<std::string, int64_t> integers;
    std::map<std::string, std::string> texts;
    std::vector<Input> inputs;
    std::vector<Bound> outputs;
};

// A run of it: inputs that are not constant are the run's own.
struct OrtKernelContext {
    explicit OrtKernelContext(const OrtKernelInfo& node) : node(node) {
        for (const Input& input : node.inputs)
            if (input.value) inputs.push_back(input.constant ? *input.value : input.value->copy());
            else inputs.emplace_back();
        outputs.resize(node.outputs.size());
    }
    const OrtKernelInfo& node;
    std::vector<std::optional<OrtValue>> inputs, outputs;
};

struct OrtCustomOpDomain {
    std::string name;
    std::vector<const OrtCustomOp*> ops;
};

struct OrtSessionOptions {
    std::vector<const OrtCustomOpDomain*> domains;
};

namespace played {

inline OrtStatus* create_status(int, const char* message) { return new OrtStatus{message}; }
inline const char* error_message(const OrtStatus* status) { return status->message.c_str(); }
inline void release_status(OrtStatus* status) { delete status; }

inline OrtStatus* create_domain(const char* name, OrtCustomOpDomain** made) {
    *made = new OrtCustomOpDomain{name, {}};
    return nullptr;
}
inline OrtStatus* add_to_domain(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
    domain->ops.push_back(op);
    return nullptr;
}
inline OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
    options->domains.push_back(domain);
    return nullptr;
}

inline OrtStatus* tensor_data(OrtValue* value, void** data) {
    *data = value->data.get();
    return nullptr;
}
inline OrtStatus* tensor_info(const OrtValue* value, OrtTensorInfo** made) {
    *made = new OrtTensorInfo{value->shape};
    return nullptr;
}
inline void release_info(OrtTensorInfo* info) { delete info; }
inline OrtStatus* rank(const OrtTensorInfo* info, size_t* rank) {
    *rank = info->shape.size();
    return nullptr;
}
inline OrtStatus* dims(const OrtTensorInfo* info, int64_t* dims, size_t count) {
    std::copy_n(info->shape.begin(), count, dims);
    return nullptr;
}

template <class T>
OrtStatus* attribute(const std::map<std::string, T>& all, const char* name, T* value) {
    const auto found = all.find(name);
    if (found == all.end()) return create_status(1, "no such attribute");
    *value = found->second;
    return nullptr;
}
inline OrtStatus* float_attribute(const OrtKernelInfo* info, const char* name, float* value) {
    return attribute(info->floats, name, value);
}
inline OrtStatus* int_attribute(const OrtKernelInfo* info, const char* name, int64_t* value) {
    return attribute(info->integers, name, value);
}
inline OrtStatus* string_attribute(const OrtKernelInfo* info, const char* name, char* value,
                                   size_t* size) {
    std::string found;
    if (OrtStatus* status = attribute(info->texts, name, &found)) return status;
    if (value != nullptr) std::memcpy(value, found.c_str(), found.size() + 1);
    *size = found.size() + 1;
    return nullptr;
}
inline OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* constant,
                                 const OrtValue** value) {
    const Input& input = info->inputs.at(index);
    *constant = input.constant;
    *value = input.constant ? &*input.value : nullptr;
    return nullptr;
}

inline OrtStatus* input_count(const OrtKernelContext* run, size_t* count) {
    *count = run->inputs.size();
    return nullptr;
}
inline OrtStatus* output_count(const OrtKernelContext* run, size_t* count) {
    *count = run->outputs.size();
    return nullptr;
}
inline OrtStatus* input(const OrtKernelContext* run, size_t index, const OrtValue** value) {
    const auto& found = run->inputs.at(index);
    *value = found ? &*found : nullptr;
    return nullptr;
}
inline OrtStatus* output(OrtKernelContext* run, size_t index, const int64_t* dims, size_t rank,
                         OrtValue** value) {
    *value = nullptr;
    if (index >= run->outputs.size()) return nullptr;
    const Bound& bound = run->node.outputs[index];
    auto& made = run->outputs[index];
    if (bound.input >= 0)
        made = run->inputs.at(bound.input);
    else
        made.emplace(bound.type, Shape(dims, dims + rank));
    *value = &*made;
    return nullptr;
}

inline OrtStatus* parallel_for(const OrtKernelContext*, void (*task)(void*, size_t), size_t count,
                               size_t, void* data) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; ++i) threads.emplace_back(task, data, i);
    for (std::thread& thread : threads) thread.join();
    return nullptr;
}

// The table, functions at their places.
inline const void* const* get_api(uint32_t) {
    static const std::vector<const void*> table = [] {
        std::vector<const void*> places(275, nullptr);
        const auto put = [&](size_t place, auto* function) {
            places[place] = reinterpret_cast<const void*>(function);
        };
        put(0, create_status), put(2, error_message), put(93, release_status);
        put(26, create_domain), put(27, add_to_domain), put(28, add_domain);
        put(51, tensor_data), put(61, rank), put(62, dims), put(65, tensor_info), put(99, release_info);
        put(85, float_attribute), put(86, int_attribute), put(87, string_attribute);
        put(88, input_count), put(89, output_count), put(90, input), put(91, output);
        put(249, constant_input), put(274, parallel_for);
        return places;
    }();
    return table.data();
}

// What a status says; empty: all is well.
inline std::string text_of(OrtStatus* status) {
    const std::unique_ptr<OrtStatus> held(status);
    return held ? held->message : "";
}

}  // namespace played
}  // namespace lvlm
