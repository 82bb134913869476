// The library's functions: RegisterCustomOps, ONNX Runtime's convention, and whether this CPU will do.
#include <hwy/targets.h>

#include "exported.h"
#include "op.h"

namespace lvlm {

std::map<std::string, std::vector<const OrtCustomOp*>>& custom_ops() {
    static std::map<std::string, std::vector<const OrtCustomOp*>> all;
    return all;
}

namespace {

// The best that this CPU has and kernels are compiled for, which is Highway's lowest bit; null: less than the
// kernels are worth.
const char* instructions() {
    const int64_t has = hwy::SupportedTargets() & HWY_TARGETS, best = has & -has;
    if (best == 0) return nullptr;
#if HWY_ARCH_X86
    if (best > HWY_AVX2) return nullptr;
#else
    if (best >= HWY_EMU128) return nullptr;
#endif
    return hwy::TargetName(best);
}

// Once for the process: sessions may outlive whoever registered.
const std::vector<OrtCustomOpDomain*>& domains(const OrtApi& api) {
    static const std::vector<OrtCustomOpDomain*> made = [&] {
        std::vector<OrtCustomOpDomain*> all;
        for (const auto& [name, ops] : custom_ops()) {
            OrtCustomOpDomain* fresh = nullptr;
            check(api, api.create_domain(name.c_str(), &fresh));
            for (const OrtCustomOp* op : ops) check(api, api.add_to_domain(fresh, op));
            all.push_back(fresh);
        }
        return all;
    }();
    return made;
}

}  // namespace
}  // namespace lvlm

// The name of the instructions that the kernels will use; null where this CPU has none of them.
LVLM_EXPORT const char* lvlm_instructions() { return lvlm::instructions(); }

// Adds the kernels to a session's options.
LVLM_EXPORT lvlm::OrtStatus* RegisterCustomOps(lvlm::OrtSessionOptions* options,
                                               const lvlm::OrtApiBase* base) {
    const void* const* table = base->get_api(lvlm::kApiVersion);
    if (table == nullptr) {  // the first entry of the table of any version
        const void* const* oldest = base->get_api(1);
        return lvlm::OrtApi(oldest).create_status(1, "lvlm's kernels need onnxruntime 1.17 or newer");
    }
    const lvlm::OrtApi api(table);
    try {
        for (lvlm::OrtCustomOpDomain* domain : lvlm::domains(api))
            lvlm::check(api, api.add_domain(options, domain));
        return nullptr;
    } catch (const std::exception& error) {
        return api.create_status(1, error.what());
    }
}
