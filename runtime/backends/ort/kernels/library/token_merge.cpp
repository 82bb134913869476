// lvlm::TokenMerge: of each image's tokens the most important stay; others go, or merge into those.
//
// What stays is chosen once for a row (merge_choice.h). Then discarded tokens meet the centres of their
// image (token_meeting.h), a run of tokens a task; of the similarities only those are kept that may lead
// to a merge. Then the output is written, each row a copy or a weighted sum of some of the input's.
#include <map>

#include "token_meeting.h"

namespace lvlm {
namespace {

constexpr size_t kRun = 96;  // tokens of a task

// Discarded tokens of one image from ``first`` on, and what they found.
struct TokenRun {
    size_t image, first;
    std::vector<Absorbable> found;
};

// One row of the batch after merging.
struct MergedRow {
    std::vector<int64_t> stay;                           // rising
    std::map<int64_t, std::vector<WeightedToken>> sums;  // of those that are no copies
};

template <class T>
class TokenMerge {
public:
    static constexpr const char* kName = "TokenMerge";
    static constexpr Port kInputs[] = {
        {element<T>()},    {Element::kFloat}, {Element::kInt64},
        {Element::kInt64}, {Element::kInt64}, {Element::kInt64},
        {Element::kInt64}, {Element::kInt64, true}, {Element::kInt64, true}};
    static constexpr Port kOutputs[] = {
        {element<T>()}, {Element::kInt64}, {Element::kInt64}, {Element::kInt64}};

    explicit TokenMerge(const Attributes& attributes)
        : rule_(attributes.text("merge", "recycle")), limit_(attributes.integer("absorb", 5)) {
        require(rule_ == "recycle" || rule_ == "nearest" || rule_ == "illava" || rule_ == "drop",
                "no such rule of merging");
        require(attributes.integer("absorb", 5) >= 1, "absorb is less than 1");
        if (rule_ == "nearest") limit_ = kNoLimit;
    }

    void operator()(Call& call) const {
        const auto hidden = call.input<T>(0, 3);
        const auto importance = call.input<float>(1, 2);
        const auto image_id = call.input<int64_t>(2, 2), positions = call.input<int64_t>(3);
        const auto keep = call.input<int64_t>(4, 2), recycle = call.input<int64_t>(7, 2);
        const int64_t slots = call.input<int64_t>(6, 1).dim(0);
        const int64_t batch = hidden.dim(0), length = hidden.dim(1), width = hidden.dim(2);
        const bool some = rule_ == "recycle" || rule_ == "illava";  // of those that stay are centres
        const Shape tokens{batch, length};
        Shape lead = positions.shape;
        require(lead.size() >= 2 && Shape(lead.end() - 2, lead.end()) == tokens &&
                    importance.shape == tokens && image_id.shape == tokens && keep.dim(0) == batch &&
                    (!some || recycle.shape == keep.shape),
                "hidden, importance, image_id, positions, keep and recycle do not fit");
        lead.back() = slots;
        const auto merged = call.output<T>(0, {batch, slots, width});
        const auto new_positions = call.output<int64_t>(1, lead);
        const auto new_image_id = call.output<int64_t>(2, {batch, slots});
        const auto map = call.output<int64_t>(3, tokens);

        std::vector<MergedRow> rows;
        std::vector<MergingImage<T>> images;
        const int64_t counts = keep.dim(1);  // of a row
        for (int64_t row = 0; row < batch; ++row) {
            RowChoice choice = choose_tokens(
                importance.data + row * length, image_id.data + row * length, length,
                keep.data + row * counts, some ? recycle.data + row * counts : nullptr, counts);
            const std::vector<int64_t>& stay = choice.stay;
            require(static_cast<int64_t>(stay.size()) <= slots, "out_slots are fewer than what stays");
            int64_t* new_index = map.data + row * length;
            std::fill(new_index, new_index + length, -1);
            for (size_t slot = 0; slot < stay.size(); ++slot) new_index[stay[slot]] = slot;
            pick(image_id.data + row * length, stay, slots, -1, new_image_id.data + row * slots);
            const int64_t leads = lead.size() == 2 ? 1 : lead[0];
            for (int64_t at = row; at < leads * batch; at += batch)
                pick(positions.data + at * length, stay, slots, 0, new_positions.data + at * slots);
            if (rule_ != "drop")
                for (ImageChoice& image : choice.images) {
                    Padded panels(padded_extent(image.centres.size()) * width);
                    images.push_back({static_cast<size_t>(row), hidden.data + row * length * width,
                                      static_cast<size_t>(width), std::move(image), std::move(panels), {}});
                }
            rows.push_back({std::move(choice.stay), {}});
        }
        merge(call, images, importance, rows, map);
        const int64_t runs = (slots + kRun - 1) / kRun;
        call.parallel(batch * runs, [&](size_t task) {
            const size_t row = task / runs, first = task % runs * kRun;
            write(rows[row], hidden.data + row * length * width, width, first,
                  std::min<size_t>(slots, first + kRun), merged.data + row * slots * width);
        });
    }

private:
    static void pick(const int64_t* from, const std::vector<int64_t>& stay, int64_t slots,
                     int64_t padding, int64_t* to) {
        for (const int64_t token : stay) *to++ = from[token];
        std::fill(to, to + slots - stay.size(), padding);
    }

    // Finds who absorbs whom: the sums of rows, and the map of what is absorbed.
    void merge(const Call& call, std::vector<MergingImage<T>>& images, const Tensor<const float>& importance,
               std::vector<MergedRow>& rows, const Tensor<int64_t>& map) const {
        std::vector<TokenRun> runs;
        for (size_t i = 0; i < images.size(); ++i)
            for (size_t first = 0; first < images[i].tokens.discarded.size(); first += kRun)
                runs.push_back({i, first, {}});
        call.parallel(images.size(), [&](size_t i) { pack_centres(images[i]); });
        call.parallel(runs.size(), [&](size_t task) {
            TokenRun& run = runs[task];
            const size_t last = std::min(images[run.image].tokens.discarded.size(), run.first + kRun);
            meet_centres(images[run.image], run.first, last, rule_ == "illava" ? limit_ : 0, run.found);
        });

        const int64_t length = map.dim(1);
        std::vector<float> similarity(length);  // to the centre that a token maps to
        auto run = runs.begin();
        for (size_t i = 0; i < images.size(); ++i) {
            const std::vector<int64_t>& centres = images[i].tokens.centres;
            std::vector<std::vector<Absorbable>> absorbed(centres.size());
            for (; run != runs.end() && run->image == i; ++run)
                for (const Absorbable& one : run->found) absorb(absorbed[one.centre], one, limit_);
            const size_t row = images[i].row;
            int64_t* new_index = map.data + row * length;
            for (size_t c = 0; c < centres.size(); ++c) {
                if (absorbed[c].empty()) continue;
                for (const Absorbable& one : absorbed[c]) {
                    if (new_index[one.token] >= 0 && !(one.similarity > similarity[one.token])) continue;
                    new_index[one.token] = new_index[centres[c]];
                    similarity[one.token] = one.similarity;
                }
                rows[row].sums[centres[c]] =
                    rule_ == "illava" ? halves(centres[c], absorbed[c], images[i].width)
                                      : mean(centres[c], absorbed[c], importance.data + row * length);
            }
        }
    }

    static std::vector<WeightedToken> mean(int64_t centre, const std::vector<Absorbable>& absorbed,
                                           const float* importance) {
        std::vector<WeightedToken> parts{{centre, importance[centre]}};
        for (const Absorbable& one : absorbed) parts.push_back({one.token, importance[one.token]});
        float total = 0;
        for (const WeightedToken& part : parts) total += part.weight;
        for (WeightedToken& part : parts) part.weight = total == 0 ? 1.0f / parts.size() : part.weight / total;
        return parts;
    }

    static std::vector<WeightedToken> halves(int64_t centre, const std::vector<Absorbable>& absorbed,
                                             size_t width) {
        std::vector<WeightedToken> parts;
        float total = 0;
        for (const Absorbable& one : absorbed) {
            const float below = one.similarity - absorbed.front().similarity;
            parts.push_back({one.token, std::exp(below / std::sqrt(static_cast<float>(width)))});
            total += parts.back().weight;
        }
        for (WeightedToken& part : parts) part.weight /= 2 * total;
        parts.push_back({centre, 0.5f});
        return parts;
    }

    static void write(const MergedRow& row, const T* hidden, size_t width, size_t first, size_t last, T* to) {
        for (size_t slot = first; slot < last; ++slot) {
            T* state = to + slot * width;
            if (slot >= row.stay.size()) {
                std::fill(state, state + width, T{});
                continue;
            }
            const T* own = hidden + row.stay[slot] * width;
            if (const auto sum = row.sums.find(row.stay[slot]); sum == row.sums.end())
                std::copy(own, own + width, state);
            else
                write_sum(hidden, width, sum->second, state);
        }
    }

    std::string rule_;
    size_t limit_;
};

const Registered<TokenMerge<float>, TokenMerge<Half>> registered;

}  // namespace
}  // namespace lvlm
