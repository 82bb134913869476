// A kernel as a custom op of ONNX Runtime. A kernel is a class in a file of its own:
//
//   template <class T> class Name {
//       static constexpr const char* kName;          // the op's, in the domain lvlm or kDomain
//       static constexpr Port kInputs[], kOutputs[];
//       explicit Name(const Attributes&);
//       void operator()(Call&) const;                // threads: Call::parallel
//   };
//   static const Registered<Name<float>, Name<Half>> registered;
//
// What it throws becomes ONNX Runtime's error.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <hwy/base.h>

#include "gate.h"
#include "ort_api.h"

namespace lvlm {

using Half = hwy::float16_t;
using Shape = std::vector<int64_t>;

struct Port {
    Element type;
    bool optional = false;
};

template <class T>
constexpr Element element() {
    if constexpr (sizeof(T) == 8) return Element::kInt64;
    if constexpr (sizeof(T) == 1) return Element::kInt8;
    return sizeof(T) == 2 ? Element::kHalf : Element::kFloat;
}

// Raises what ONNX Runtime says.
inline void check(const OrtApi& api, OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api.error_message(status);
    api.release_status(status);
    throw std::runtime_error(message);
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <class T>
struct Tensor;

// A node's attributes; of a name that it has not, the default.
class Attributes {
public:
    Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

    float number(const char* name) const {
        float value = 0;
        check(api_, api_.float_attribute(info_, name, &value));
        return value;
    }
    float number(const char* name, float otherwise) const {
        float value = 0;
        return had(api_.float_attribute(info_, name, &value)) ? value : otherwise;
    }
    int64_t integer(const char* name, int64_t otherwise) const {
        int64_t value = 0;
        return had(api_.int_attribute(info_, name, &value)) ? value : otherwise;
    }
    // Input ``index``, if the same tensor comes with every call.
    template <class T>
    Tensor<const T> constant(size_t index) const;

    std::string text(const char* name, const char* otherwise) const {
        size_t size = 0;
        if (!had(api_.string_attribute(info_, name, nullptr, &size))) return otherwise;
        std::string value(size, '\0');
        check(api_, api_.string_attribute(info_, name, value.data(), &size));
        value.resize(size > 0 ? size - 1 : 0);  // less the zero at the end
        return value;
    }

private:
    bool had(OrtStatus* status) const {
        if (status == nullptr) return true;
        api_.release_status(status);
        return false;
    }
    const OrtApi& api_;
    const OrtKernelInfo* info_;
};

template <class T>
struct Tensor {
    T* data = nullptr;  // null: not given
    Shape shape;

    int64_t dim(size_t axis) const { return shape[axis]; }
    explicit operator bool() const { return data != nullptr; }
};

inline Shape shape_of(const OrtApi& api, const OrtValue* value) {
    OrtTensorInfo* info = nullptr;
    check(api, api.tensor_info(value, &info));
    const std::unique_ptr<OrtTensorInfo, void (*)(OrtTensorInfo*)> held(info, api.release_info);
    size_t rank = 0;
    check(api, api.rank(info, &rank));
    Shape shape(rank);
    check(api, api.dims(info, shape.data(), rank));
    return shape;
}

template <class T>
Tensor<const T> tensor_of(const OrtApi& api, const OrtValue* value) {
    void* data = nullptr;
    check(api, api.tensor_data(const_cast<OrtValue*>(value), &data));
    return {static_cast<const T*>(data), shape_of(api, value)};
}

template <class T>
Tensor<const T> Attributes::constant(size_t index) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.constant_input(info_, index, &constant, &value));
    if (!constant || value == nullptr) return {};
    return tensor_of<T>(api_, value);
}

// One run of a kernel: its tensors, and ONNX Runtime's threads.
class Call {
public:
    Call(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {
        check(api_, api_.input_count(context_, &inputs_));
        check(api_, api_.output_count(context_, &outputs_));
    }

    template <class T>
    Tensor<const T> input(size_t index) const {
        const OrtValue* value = nullptr;
        if (index < inputs_) check(api_, api_.input(context_, index, &value));
        if (value == nullptr) return {};
        return tensor_of<T>(api_, value);
    }

    // One that has ``rank`` axes where it is given.
    template <class T>
    Tensor<const T> input(size_t index, size_t rank) const {
        auto found = input<T>(index);
        require((!found && found.shape.empty()) || found.shape.size() == rank,
                "an input has another number of axes than the op takes");
        return found;
    }

    bool wants(size_t output) const { return output < outputs_; }

    template <class T>
    Tensor<T> output(size_t index, Shape shape) const {
        OrtValue* value = nullptr;
        check(api_, api_.output(context_, index, shape.data(), shape.size(), &value));
        if (value == nullptr) return {};
        void* data = nullptr;
        check(api_, api_.tensor_data(value, &data));
        return {static_cast<T*>(data), std::move(shape)};
    }

    // task(0) … task(count - 1), on the session's threads and this one; raises what one raised.
    void parallel(size_t count, const std::function<void(size_t)>& task) const {
        if (count <= 1) {
            if (count == 1) task(0);
            return;
        }
        Tasks tasks{task, std::vector<std::exception_ptr>(count)};
        check(api_, api_.parallel_for(context_, &Tasks::run, count, 0, &tasks));
        for (const std::exception_ptr& raised : tasks.raised)
            if (raised) std::rethrow_exception(raised);
    }

private:
    struct Tasks {
        const std::function<void(size_t)>& task;
        std::vector<std::exception_ptr> raised;

        static void run(void* self, size_t index) {
            auto* tasks = static_cast<Tasks*>(self);
            try {
                tasks->task(index);
            } catch (...) {
                tasks->raised[index] = std::current_exception();
            }
        }
    };

    const OrtApi& api_;
    OrtKernelContext* context_;
    size_t inputs_ = 0, outputs_ = 0;
};

constexpr const char* kOwnDomain = "lvlm";

// The domain that a kernel names, as kDomain, or our own.
template <class K, class = void>
struct DomainOf {
    static constexpr const char* kName = kOwnDomain;
};
template <class K>
struct DomainOf<K, std::void_t<decltype(K::kDomain)>> {
    static constexpr const char* kName = K::kDomain;
};

// The kernel class K behind ONNX Runtime's table of functions.
template <class K>
class CustomOp : public OrtCustomOp {
public:
    CustomOp() : OrtCustomOp{} {
        version = kApiVersion;
        name = [](const OrtCustomOp*) { return K::kName; };
        provider = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
        input_type = [](const OrtCustomOp*, size_t i) { return K::kInputs[i].type; };
        output_type = [](const OrtCustomOp*, size_t i) { return K::kOutputs[i].type; };
        input_count = [](const OrtCustomOp*) { return std::size(K::kInputs); };
        output_count = [](const OrtCustomOp*) { return std::size(K::kOutputs); };
        input_kind = [](const OrtCustomOp*, size_t i) { return int{K::kInputs[i].optional}; };
        output_kind = [](const OrtCustomOp*, size_t i) { return int{K::kOutputs[i].optional}; };
        input_memory = [](const OrtCustomOp*, size_t) { return 0; };
        variadic_input_minimum = variadic_output_minimum = [](const OrtCustomOp*) { return 1; };
        variadic_input_homogeneous = variadic_output_homogeneous = [](const OrtCustomOp*) { return 1; };
        create_kernel_v2 = create;
        compute_v2 = compute;
        this->destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        start_version = end_version = [](const OrtCustomOp*) { return 1; };
    }

private:
    struct Kernel {
        OrtApi api;
        K compute;
    };

    static OrtStatus* create(const OrtCustomOp*, const void* const* table, const OrtKernelInfo* info,
                             void** made) {
        const OrtApi api(table);
        return guarded(api, [&] {
            *made = new Kernel{api, K(Attributes(api, info))};
            count_kernel();
        });
    }
    static OrtStatus* compute(void* self, OrtKernelContext* context) {
        const auto& kernel = *static_cast<Kernel*>(self);
        return guarded(kernel.api, [&] {
            Call call(kernel.api, context);
            if (Gate* gate = Gate::here())
                gate->pass([&](size_t count, const auto& task) { call.parallel(count, task); });
            kernel.compute(call);
        });
    }
    template <class F>
    static OrtStatus* guarded(const OrtApi& api, F&& work) {
        try {
            work();
            return nullptr;
        } catch (const std::exception& error) {
            return api.create_status(
                1, (std::string(DomainOf<K>::kName) + "::" + K::kName + ": " + error.what()).c_str());
        }
    }
};

// What the library offers, by domain.
std::map<std::string, std::vector<const OrtCustomOp*>>& custom_ops();

// Adds custom ops to it.
template <class... K>
struct Registered {
    Registered() { (custom_ops()[DomainOf<K>::kName].push_back(op<K>()), ...); }

private:
    template <class Kernel>
    static const OrtCustomOp* op() {
        static const CustomOp<Kernel> only;
        return &only;
    }
};

}  // namespace lvlm
