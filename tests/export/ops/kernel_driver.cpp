// Runs nodes of the CPU kernels' library without ONNX Runtime, whose C interface is played
// (played_onnxruntime.h): kernels alone can be under a sanitizer, or on another kind of CPU.
//
//   kernel_driver CASES RESULTS        both of kernel_driver.py
//
// Of each node two kernels are made and run at once, as sessions and runs of several threads are.
#include <hwy/aligned_allocator.h>
#include <hwy/targets.h>

#include <cstdio>
#include <fstream>
#include <new>
#include <set>

#include "padded.h"
#include "played_onnxruntime.h"

extern "C" lvlm::OrtStatus* RegisterCustomOps(lvlm::OrtSessionOptions*, const lvlm::OrtApiBase*);
extern "C" const char* lvlm_instructions();

// Highway's library, played as well: memory of a kernel's own is a block of its own size, too, where
// Highway leaves room behind it, and no library for the other kind of CPU is needed.
namespace hwy {

void* AllocateAlignedBytes(size_t size, AllocPtr, void*) {
    return ::operator new(size, std::align_val_t{lvlm::kLineBytes});
}
void FreeAlignedBytes(const void* held, FreePtr, void*) {
    ::operator delete(const_cast<void*>(held), std::align_val_t{lvlm::kLineBytes});
}
int64_t SupportedTargets() { return ~int64_t{0}; }  // more than kernels are compiled for

}  // namespace hwy

namespace lvlm {
namespace {

using played::get_api, played::text_of;

void at_once(const std::function<void(size_t)>& work) {
    std::thread other(work, 1);
    work(0);
    other.join();
}

// The op of the node's name that takes its types.
const OrtCustomOp* op_of(const OrtSessionOptions& options, const OrtKernelInfo& node) {
    for (const OrtCustomOpDomain* domain : options.domains)
        for (const OrtCustomOp* op : domain->ops) {
            if (domain->name != node.domain || op->name(op) != node.name) continue;
            bool fits = node.inputs.size() <= op->input_count(op);
            for (size_t i = 0; fits && i < node.inputs.size(); ++i)
                fits = !node.inputs[i].value || node.inputs[i].value->type == op->input_type(op, i);
            for (size_t i = 0; fits && i < node.outputs.size(); ++i)
                fits = node.outputs[i].type == op->output_type(op, i);
            if (fits) return op;
        }
    return nullptr;
}

// Runs it, twice at once; returns what went wrong, or nothing.
std::string run(const OrtCustomOp* op, const OrtKernelInfo& node, OrtKernelContext (&runs)[2]) {
    void* kernels[2] = {};
    std::string said[2];
    at_once([&](size_t i) { said[i] = text_of(op->create_kernel_v2(op, get_api(0), &node, &kernels[i])); });
    if (said[0].empty() && said[1].empty())
        at_once([&](size_t i) { said[i] = text_of(op->compute_v2(kernels[0], &runs[i])); });
    at_once([&](size_t i) {
        if (kernels[i] != nullptr) op->destroy(kernels[i]);
    });
    if (said[0] != said[1]) return "two runs at once end otherwise: " + said[0] + " | " + said[1];
    for (size_t i = 0; said[0].empty() && i < runs[0].outputs.size(); ++i) {
        const auto &one = runs[0].outputs[i], &other = runs[1].outputs[i];
        if (!one || !other) return "an output is not written";
        if (std::memcmp(one->data.get(), other->data.get(), one->bytes()) != 0)
            return "two runs at once give other values";
    }
    return said[0];
}

class Reader {
public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {}

    int64_t number() {
        int64_t value = 0;
        raw(&value, sizeof value);
        return value;
    }
    std::string text() {
        std::string value(number(), '\0');
        raw(value.data(), value.size());
        return value;
    }
    OrtValue tensor() {
        const auto type = static_cast<Element>(number());
        Shape shape(number());
        for (int64_t& extent : shape) extent = number();
        OrtValue value(type, shape);
        raw(value.data.get(), value.bytes());
        return value;
    }
    OrtKernelInfo node() {
        OrtKernelInfo node;
        node.domain = text(), node.name = text();
        for (int64_t left = number(); left > 0; --left) {
            const std::string name = text();
            const int64_t kind = number();
            if (kind == 0) raw(&node.floats[name], sizeof(float));
            if (kind == 1) node.integers[name] = number();
            if (kind == 2) node.texts[name] = text();
        }
        for (int64_t left = number(); left > 0; --left) {
            const bool given = number() != 0, constant = number() != 0;
            node.inputs.push_back({given ? std::optional(tensor()) : std::nullopt, constant});
        }
        for (int64_t left = number(); left > 0; --left) {
            const auto type = static_cast<Element>(number());
            node.outputs.push_back({type, number()});
        }
        return node;
    }

private:
    void raw(void* to, size_t size) {
        if (!file_.read(static_cast<char*>(to), size)) throw std::runtime_error("the cases end too early");
    }
    std::ifstream file_;
};

class Writer {
public:
    explicit Writer(const char* path) : file_(path, std::ios::binary) {}

    void number(int64_t value) { file_.write(reinterpret_cast<const char*>(&value), sizeof value); }
    void text(const std::string& value) {
        number(value.size());
        file_.write(value.data(), value.size());
    }
    void tensor(const OrtValue& value) {
        number(static_cast<int64_t>(value.type));
        number(value.shape.size());
        for (const int64_t extent : value.shape) number(extent);
        file_.write(value.data.get(), value.bytes());
    }

private:
    std::ofstream file_;
};

int run_all(Reader cases, Writer results) {
    const OrtApiBase base{get_api, [] { return "played"; }};
    OrtSessionOptions options;
    if (lvlm_instructions() != std::string(hwy::TargetName(HWY_STATIC_TARGET)))
        throw std::runtime_error(std::string("kernels would use ") + lvlm_instructions());
    if (const std::string said = text_of(RegisterCustomOps(&options, &base)); !said.empty())
        throw std::runtime_error(said);
    std::set<const OrtCustomOp*> left_out;
    for (const OrtCustomOpDomain* domain : options.domains)
        left_out.insert(domain->ops.begin(), domain->ops.end());
    for (int64_t left = cases.number(); left > 0; --left) {
        const OrtKernelInfo node = cases.node();
        const OrtCustomOp* op = op_of(options, node);
        if (op == nullptr) throw std::runtime_error("no kernel for " + node.domain + "::" + node.name);
        OrtKernelContext runs[2]{OrtKernelContext(node), OrtKernelContext(node)};
        left_out.erase(op);
        const std::string said = run(op, node, runs);
        results.text(said);
        if (!said.empty()) continue;
        results.number(runs[0].outputs.size());
        for (const auto& output : runs[0].outputs) results.tensor(*output);
    }
    for (const OrtCustomOp* op : left_out)
        throw std::runtime_error(std::string("no case for a kernel of ") + op->name(op));
    for (const OrtCustomOpDomain* domain : options.domains) delete domain;
    return 0;
}

}  // namespace
}  // namespace lvlm

int main(int, char** arguments) {
    try {
        return lvlm::run_all(lvlm::Reader(arguments[1]), lvlm::Writer(arguments[2]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
