// lvlm.lowered::ExtendAttention: new tokens are turned, written into the cache, and attend to entries that
// are there and to one another, as a mask says.
//
// A block is a run of new tokens with all query heads of a group. Where blocks are few their keys are divided
// among tasks, by sizes and mask alone, so that results do not depend on threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "extend_attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "extend_block-inl.h"
#include "op.h"
#include "padded.h"

HWY_BEFORE_NAMESPACE();
namespace lvlm {
namespace HWY_NAMESPACE {

void RunFloat(const Block<float, float>& b, Stage stage, size_t part) { RunStage(b, stage, part); }
void RunMixed(const Block<float, Half>& b, Stage stage, size_t part) { RunStage(b, stage, part); }
void RunHalf(const Block<Half, Half>& b, Stage stage, size_t part) { RunStage(b, stage, part); }
void RunBytes(const Block<float, int8_t>& b, Stage stage, size_t part) { RunStage(b, stage, part); }
void RunHalfBytes(const Block<Half, int8_t>& b, Stage stage, size_t part) { RunStage(b, stage, part); }

}  // namespace HWY_NAMESPACE
}  // namespace lvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cstring>

namespace lvlm {
namespace {

HWY_EXPORT(RunFloat);
HWY_EXPORT(RunMixed);
HWY_EXPORT(RunHalf);
HWY_EXPORT(RunBytes);
HWY_EXPORT(RunHalfBytes);

void run(const Block<float, float>& b, Stage s, size_t part = 0) { HWY_DYNAMIC_DISPATCH(RunFloat)(b, s, part); }
void run(const Block<float, Half>& b, Stage s, size_t part = 0) { HWY_DYNAMIC_DISPATCH(RunMixed)(b, s, part); }
void run(const Block<Half, Half>& b, Stage s, size_t part = 0) { HWY_DYNAMIC_DISPATCH(RunHalf)(b, s, part); }
void run(const Block<float, int8_t>& b, Stage s, size_t part = 0) { HWY_DYNAMIC_DISPATCH(RunBytes)(b, s, part); }
void run(const Block<Half, int8_t>& b, Stage s, size_t part = 0) { HWY_DYNAMIC_DISPATCH(RunHalfBytes)(b, s, part); }

constexpr size_t kTasks = 8;  // at least, if there are as many runs of keys

// Appends what the ``tokens`` rows of a mask [.., stride] leave of ``count`` keys.
void find_pieces(const uint8_t* mask, size_t tokens, size_t stride, size_t count, bool fresh,
                 std::vector<Piece>& pieces) {
    for (size_t start = 0; start < count; start += kKeys) {
        const size_t extent = std::min(kKeys, count - start);
        size_t first = extent, last = 0;
        bool whole = true;
        for (size_t t = 0; t < tokens; ++t) {
            const uint8_t* row = mask + t * stride + start;
            const void* hidden = std::memchr(row, 0, extent);
            if (hidden == nullptr) {
                first = 0, last = extent;
                continue;
            }
            whole = false;
            for (size_t j = 0; j < first; ++j)
                if (row[j]) first = j;
            for (size_t j = extent; j > last; --j)
                if (row[j - 1]) last = j;
        }
        if (first < last) pieces.push_back({start + first, start + last, fresh, whole});
    }
}

// The inputs of a call; raises if they do not fit together.
template <class T, class C>
struct Given {
    Tensor<const T> packed, cos, sin;
    Tensor<const C> past_key, past_value;
    Tensor<const int64_t> index, slots;
    Tensor<const uint8_t> mask;
    size_t batch, tokens, past, seen, capacity, width;
    size_t entry;  // numbers of one
    bool in_order = true;  // the slots are, one after the other

    Given(const Call& call, size_t heads, size_t key_heads)
        : packed(call.input<T>(0, 3)), cos(call.input<T>(5, 3)), sin(call.input<T>(6, 3)),
          past_key(call.input<C>(1, 4)), past_value(call.input<C>(2, 4)),
          index(call.input<int64_t>(3, 1)), slots(call.input<int64_t>(4, 1)),
          mask(call.input<uint8_t>(7, 4)),
          batch(packed.dim(0)), tokens(packed.dim(1)), past(slots.dim(0)), seen(past + tokens),
          capacity(past_key.dim(2)), width(past_key.dim(3) - kScaled<C>), entry(past_key.dim(3)) {
        const Shape angles = shape(batch, tokens, width / 2);
        const Shape masked = shape(mask.dim(0), 1, tokens, seen);
        require(packed.shape == shape(batch, tokens, (heads + 2 * key_heads) * width) &&
                    past_key.shape == shape(batch, key_heads, capacity, entry) &&
                    past_value.shape == past_key.shape && cos.shape == angles && sin.shape == angles &&
                    index.dim(0) == int64_t(batch) && mask.shape == masked &&
                    (masked[0] == 1 || masked[0] == int64_t(batch)) && width % kLine == 0,
                "new tokens, cache, rotary angles and mask do not fit");
        for (size_t i = 0; i < past; ++i) {
            const int64_t slot = slots.data[i];
            require(slot >= 0 && slot < int64_t(capacity), "a slot is beyond the cache");
            in_order = in_order && slot == slots.data[0] + int64_t(i);
        }
        for (size_t row = 0; row < batch; ++row)
            require(index.data[row] >= 0 && index.data[row] + tokens <= capacity,
                    "new entries go beyond the cache");
    }

    template <class... N>
    static Shape shape(N... extents) {
        return {static_cast<int64_t>(extents)...};
    }
};

template <class T, class C>
class ExtendAttention {
public:
    static constexpr const char *kName = "ExtendAttention", *kDomain = "lvlm.lowered";
    static constexpr Port kInputs[] = {
        {element<T>()},    {element<C>()}, {element<C>()}, {Element::kInt64},
        {Element::kInt64}, {element<T>()}, {element<T>()}, {Element::kBool}};
    static constexpr Port kOutputs[] = {{element<T>()}, {element<C>()}, {element<C>()}};

    explicit ExtendAttention(const Attributes& attributes)
        : heads_(attributes.integer("num_heads", 0)),
          key_heads_(attributes.integer("kv_num_heads", 0)),
          scale_(attributes.number("scale")) {
        require(heads_ > 0 && key_heads_ > 0 && heads_ % key_heads_ == 0, "heads do not fit");
    }

    void operator()(Call& call) const {
        const Given<T, C> given(call, heads_, key_heads_);
        const size_t tokens = given.tokens, width = given.width, group = heads_ / key_heads_;
        const auto output = call.output<T>(0, given.shape(given.batch, tokens, heads_ * width));
        const auto keys = call.output<C>(1, given.past_key.shape);
        const auto values = call.output<C>(2, given.past_value.shape);
        keep(given.past_key, keys);
        keep(given.past_value, values);

        const size_t step = std::max<size_t>(1, kColumns / group), heads = given.batch * key_heads_;
        const size_t all = heads * ((tokens + step - 1) / step);  // blocks
        const size_t columns = padded_extent(std::min(step, tokens) * group);
        Padded new_keys(heads * tokens * width), new_values(new_keys.size());
        Padded queries(all * columns * width);
        std::vector<Block<T, C>> each;
        std::vector<std::pair<size_t, size_t>> tasks;  // block, part
        for (size_t row = 0; row < given.batch; ++row)
            for (size_t start = 0; start < tokens; start += step) {
                Block<T, C> block = block_of(given, row, start, std::min(step, tokens - start));
                block.columns = columns;
                block.parts = std::min((kTasks + all - 1) / all, block.pieces.size());
                block.parts = std::max<size_t>(1, block.parts);
                for (size_t head = 0; head < key_heads_; ++head) {
                    const size_t fresh = (row * key_heads_ + head) * tokens * width;
                    const size_t cache = (row * key_heads_ + head) * given.capacity * given.entry;
                    const size_t to = cache + (given.index.data[row] + start) * given.entry;
                    block.queries = queries.data() + each.size() * columns * width;
                    block.new_keys = new_keys.data() + fresh;
                    block.new_values = new_values.data() + fresh;
                    block.own_keys = new_keys.data() + fresh + start * width;
                    block.own_values = new_values.data() + fresh + start * width;
                    block.key_slots = keys.data + to;
                    block.value_slots = values.data + to;
                    block.output = output.data + (row * tokens + start) * block.next + head * group * width;
                    for (size_t part = 0; part < block.parts; ++part)
                        tasks.emplace_back(each.size(), part);
                    each.push_back(block);
                    block.query += group * width, block.key += width, block.value += width;
                    block.past_keys += given.capacity * given.entry;
                    block.past_values += given.capacity * given.entry;
                }
            }
        const size_t room = step * group * width;
        Padded sums(tasks.size() * room), most(tasks.size() * columns), total(most.size());
        for (size_t task = tasks.size(); task-- > 0;) {  // a block's first part comes last
            Block<T, C>& block = each[tasks[task].first];
            block.sums = sums.data() + task * room;
            block.most = most.data() + task * columns;
            block.total = total.data() + task * columns;
        }
        call.parallel(all, [&](size_t i) { run(each[i], Stage::kEnter); });
        call.parallel(tasks.size(),
                      [&](size_t i) { run(each[tasks[i].first], Stage::kAttend, tasks[i].second); });
        call.parallel(all, [&](size_t i) { run(each[i], Stage::kJoin); });
    }

private:
    // What the inputs say of ``tokens`` new ones from ``start`` on, for the first key head.
    Block<T, C> block_of(const Given<T, C>& given, size_t row, size_t start, size_t tokens) const {
        const size_t width = given.width, line = (heads_ + 2 * key_heads_) * width;
        const size_t at = row * given.tokens + start;
        const size_t cache = row * key_heads_ * given.capacity * given.entry;
        const bool together = given.in_order && given.past > 0;
        const size_t from = cache + (together ? given.slots.data[0] * given.entry : 0);
        Block<T, C> block{};
        block.group = heads_ / key_heads_;
        block.width = width;
        block.tokens = tokens;
        block.scale = scale_;
        block.stride = line;
        block.next = heads_ * width;
        block.query = given.packed.data + at * line;
        block.key = block.query + heads_ * width;
        block.value = block.key + key_heads_ * width;
        block.cos = given.cos.data + at * width / 2;
        block.sin = given.sin.data + at * width / 2;
        block.past_keys = given.past_key.data + from;
        block.past_values = given.past_value.data + from;
        block.slots = together ? nullptr : given.slots.data;
        block.past = given.past;
        block.seen = given.seen;
        block.mask = given.mask.data + (given.mask.dim(0) == 1 ? start : at) * given.seen;
        find_pieces(block.mask, tokens, given.seen, given.past, false, block.pieces);
        find_pieces(block.mask + given.past, tokens, given.seen, given.tokens, true, block.pieces);
        return block;
    }

    // Where the cache is not bound in place.
    static void keep(const Tensor<const C>& from, const Tensor<C>& to) {
        size_t count = 1;
        for (const int64_t extent : from.shape) count *= extent;
        if (from.data != to.data) std::memcpy(to.data, from.data, count * sizeof(C));
    }

    size_t heads_, key_heads_;
    float scale_;
};

const Registered<ExtendAttention<float, float>, ExtendAttention<float, Half>, ExtendAttention<Half, Half>,
                 ExtendAttention<float, int8_t>, ExtendAttention<Half, int8_t>>
    registered;

}  // namespace
}  // namespace lvlm
#endif
