// lvlm::CacheCompact: a cache shortened to a budget per row; entries go, or merge into their neighbours.
//
// Which entries stay is chosen once for a row; its heads, keys and values are moved each by a task.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cache_compact.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "attention-inl.h"
#include "op.h"
#include "padded.h"

#ifndef LVLM_CACHE_COMPACT_ONCE
#define LVLM_CACHE_COMPACT_ONCE
namespace lvlm {

// The entries of one row that stay, move and merge.
struct Compaction {
    std::vector<int64_t> stay;     // positions, rising
    std::vector<int64_t> anchors;  // those of them that absorb
    std::vector<int64_t> sources;  // what they absorb: each goes to the nearest by index, ties to the left
};

}  // namespace lvlm
#endif

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

// One head: ``from`` [n, width] to ``to`` [slots, width]; slots beyond what stays are 0.
template <class T>
void MoveHead(const Compaction& plan, const T* from, size_t width, size_t slots, T* to) {
    for (size_t k = 0; k < plan.stay.size(); ++k) {
        const T* entry = from + plan.stay[k] * width;
        std::copy(entry, entry + width, to + k * width);
    }
    std::fill(to + plan.stay.size() * width, to + slots * width, T{});
    if (plan.sources.empty()) return;

    Padded total(width);
    size_t next = 0, slot = 0;
    for (size_t a = 0; a < plan.anchors.size(); ++a) {
        const bool last = a + 1 == plan.anchors.size();
        const size_t first = next;
        while (next < plan.sources.size() &&
               (last || plan.sources[next] <= (plan.anchors[a] + plan.anchors[a + 1]) / 2))
            ++next;
        if (next == first) continue;
        CopyScaled(from + plan.anchors[a] * width, width, 1, total.data());
        for (size_t s = first; s < next; ++s) {
            const T* entry = from + plan.sources[s] * width;
            for (size_t i = 0; i < width; ++i) total.data()[i] += Widened(entry[i]);
        }
        while (plan.stay[slot] != plan.anchors[a]) ++slot;
        const auto count = static_cast<float>(next - first + 1);
        for (size_t i = 0; i < width; ++i) Narrow(total.data()[i] / count, to + slot * width + i);
    }
}

void MoveFloat(const Compaction& p, const float* from, size_t width, size_t slots, float* to) {
    MoveHead(p, from, width, slots, to);
}
void MoveHalf(const Compaction& p, const Half* from, size_t width, size_t slots, Half* to) {
    MoveHead(p, from, width, slots, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cmath>
#include <numeric>

namespace lvlm {
namespace {

HWY_EXPORT(MoveFloat);
HWY_EXPORT(MoveHalf);

void move(const Compaction& p, const float* from, size_t width, size_t slots, float* to) {
    HWY_DYNAMIC_DISPATCH(MoveFloat)(p, from, width, slots, to);
}
void move(const Compaction& p, const Half* from, size_t width, size_t slots, Half* to) {
    HWY_DYNAMIC_DISPATCH(MoveHalf)(p, from, width, slots, to);
}

std::vector<int64_t> numbers(int64_t first, int64_t end) {
    std::vector<int64_t> all(std::max<int64_t>(end - first, 0));
    std::iota(all.begin(), all.end(), first);
    return all;
}

// The protected and the most important positions; equal: the lower first.
std::vector<int64_t> most_important(const std::vector<float>& score, int64_t budget, int64_t sinks,
                                    int64_t recent) {
    const auto length = static_cast<int64_t>(score.size());
    std::vector<int64_t> order = numbers(0, length);
    const auto edge = [&](int64_t i) { return i < sinks || i >= length - recent; };
    const auto before = [&](int64_t a, int64_t b) {
        if (edge(a) != edge(b)) return edge(a);
        if (!edge(a) && score[a] != score[b]) return score[a] > score[b];
        return a < b;
    };
    if (budget < length) std::nth_element(order.begin(), order.begin() + budget, order.end(), before);
    order.resize(budget);
    std::sort(order.begin(), order.end());
    return order;
}

// Elastic Cache's released code: a permutation is compared with a count as if it were ranks.
Compaction as_released(const std::vector<float>& score, int64_t budget, int64_t sinks) {
    const auto length = static_cast<int64_t>(score.size());
    const int64_t forget = length - 1 - budget;
    if (forget <= 0) return {numbers(length - budget, length), {}, {}};
    std::vector<int64_t> order = numbers(0, length - 1 - sinks);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return score[a + sinks] < score[b + sinks]; });
    Compaction plan{numbers(0, sinks), {}, {}};
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
        if (order[i] > forget)
            plan.anchors.push_back(i + sinks);
        else
            plan.sources.push_back(i);
    }
    if (plan.anchors.empty()) plan.sources.clear();
    plan.stay.insert(plan.stay.end(), plan.anchors.begin(), plan.anchors.end());
    plan.stay.push_back(length - 1);
    return plan;
}

template <class T>
class CacheCompact {
public:
    static constexpr const char* kName = "CacheCompact";
    static constexpr Port kInputs[] = {{element<T>()},   {element<T>()},   {Element::kFloat},
                                       {Element::kInt64}, {Element::kInt64}, {Element::kInt64}};
    static constexpr Port kOutputs[] = {
        {element<T>()}, {element<T>()}, {Element::kInt64}, {Element::kInt64}};

    explicit CacheCompact(const Attributes& attributes)
        : mode_(attributes.text("mode", "evict")),
          sinks_(attributes.integer("sinks", 1)),
          recent_(attributes.integer("recent", 1)) {
        require(mode_ == "evict" || mode_ == "merge" || mode_ == "merge-reference",
                "no such mode of compaction");
    }

    void operator()(Call& call) const {
        const auto key = call.input<T>(0, 4), value = call.input<T>(1, 4);
        const auto importance = call.input<float>(2, 2);
        const auto length = call.input<int64_t>(3, 1), budget = call.input<int64_t>(4, 1);
        const int64_t slots = call.input<int64_t>(5, 1).dim(0);
        const int64_t batch = key.dim(0), heads = key.dim(1), positions = key.dim(2);
        require(value.dim(0) == batch && value.dim(1) == heads && value.dim(2) == positions &&
                    importance.shape == Shape{batch, positions} && length.dim(0) == batch &&
                    budget.dim(0) == batch,
                "key, value, importance, length and budget do not fit");
        const auto new_key = call.output<T>(0, {batch, heads, slots, key.dim(3)});
        const auto new_value = call.output<T>(1, {batch, heads, slots, value.dim(3)});
        const auto kept_index = call.output<int64_t>(2, {batch, slots});
        const auto kept = call.output<int64_t>(3, {batch});

        std::vector<Compaction> plans;
        for (int64_t row = 0; row < batch; ++row) {
            const int64_t valid = length.data[row], stays = budget.data[row];
            require(valid <= positions && stays >= 0 && stays <= std::min(valid, slots),
                    "budget <= length and slots does not hold in every row");
            std::vector<float> score(importance.data + row * positions,
                                     importance.data + row * positions + valid);
            kept.data[row] = stays;
            for (float& x : score)
                if (!std::isfinite(x)) x = 0, kept.data[row] = -1;
            plans.push_back(plan(score, stays));
            require(static_cast<int64_t>(plans.back().stay.size()) <= slots,
                    "the budget has no room for what is protected");
            int64_t* index = kept_index.data + row * slots;
            std::fill(index, index + slots, -1);
            std::copy(plans.back().stay.begin(), plans.back().stay.end(), index);
        }
        call.parallel(batch * heads * 2, [&](size_t task) {
            const size_t head = task / 2;
            const auto& [from, to] = task % 2 == 0 ? std::pair{key, new_key} : std::pair{value, new_value};
            const size_t width = from.dim(3);
            move(plans[head / heads], from.data + head * positions * width, width, slots,
                 to.data + head * slots * width);
        });
    }

private:
    Compaction plan(const std::vector<float>& score, int64_t budget) const {
        if (mode_ == "merge-reference") return as_released(score, budget, sinks_);
        Compaction made{most_important(score, budget, sinks_, recent_), {}, {}};
        if (mode_ == "evict") return made;
        made.anchors = made.stay;
        size_t next = 0;
        for (int64_t i = 0; i < static_cast<int64_t>(score.size()); ++i) {
            if (next < made.stay.size() && made.stay[next] == i)
                ++next;
            else if (!made.stay.empty())
                made.sources.push_back(i);
        }
        return made;
    }

    std::string mode_;
    int64_t sinks_, recent_;
};

const Registered<CacheCompact<float>, CacheCompact<Half>> registered;

}  // namespace
}  // namespace lvlm
#endif
