#include "row_ops.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace edge {
namespace {

constexpr int64_t kMaxValues = 1ll << 31;
constexpr int64_t kInlineValues = 16384;  // fewer take less than handing them to other threads
constexpr int kBlocksOfAPiece = 64;       // that a thread looks at, at least

struct Candidate {
    float value;
    int64_t id;
    // the better one first
    bool operator<(const Candidate& other) const { return value != other.value ? value > other.value : id < other.id; }
};

constexpr int kBlockValues = 128;  // of a row, known by their largest

// The k best of a row whose blocks' largest values are known: as k blocks reach the k-th largest of those, the k best
// values do too, and only blocks that reach it are looked into. False where the row holds a NaN.
bool select(const float* row, int64_t size, const std::vector<float>& largest, int k, float* values, int64_t* ids) {
    std::vector<float> ordered(largest);
    if (std::any_of(ordered.begin(), ordered.end(), [](float value) { return std::isnan(value); })) return false;
    float bar = -INFINITY;
    if (ordered.size() >= size_t(k)) {
        std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<float>());
        bar = ordered[size_t(k - 1)];
    }
    std::vector<Candidate> found;
    for (size_t block = 0; block < largest.size(); block++) {
        if (largest[block] < bar) continue;
        const int64_t first = int64_t(block) * kBlockValues, last = std::min(size, first + kBlockValues);
        for (int64_t id = first; id < last; id++)
            if (row[id] >= bar) found.push_back({row[id], id});
    }
    std::partial_sort(found.begin(), found.begin() + k, found.end());
    for (int i = 0; i < k; i++) values[i] = found[size_t(i)].value, ids[i] = found[size_t(i)].id;
    return true;
}

}  // namespace

void NormAdd::compute(const Context& context) const {
    const Tensor x = context.input(0), weight = context.input(1), residual = context.input(2);
    const int64_t size = weight.size(), num_rows = size ? x.size() / size : 0;
    require(size > 0 && size <= 1 << 24 && x.last() % size == 0, "x has another width than its weight");
    require(residual.size() == x.size(), "x and residual differ in size");
    require(x.size() <= kMaxValues, "x has too many values");
    const Tensor next = context.num_inputs() > 3 ? context.input(3) : Tensor{};
    require(!next.data || next.size() == size, "next_weight has another size than weight");
    float* total = static_cast<float*>(context.output(0, x.dims, x.rank));
    float* normed = next.data ? static_cast<float*>(context.output(1, x.dims, x.rank)) : nullptr;
    if (num_rows == 0 || !total) return;

    const Kernels& kernels = edge::kernels();
    const float* next_weight = normed ? next.floats() : nullptr;
    Claims claims(static_cast<int>(num_rows));
    auto work = [&] {
        for (int first, last; claims.next(first, last);) {
            for (int row = first; row < last; row++) {
                const size_t place = size_t(row) * size_t(size);
                kernels.norm_add(x.floats() + place, weight.floats(), residual.floats() + place, int(size), epsilon_, scale_,
                                 total + place, next_weight, next_epsilon_, normed ? normed + place : nullptr);
            }
        }
    };
    if (x.size() <= kInlineValues) work();
    else context.run_on_all_threads(work);
}

void TopLogits::compute(const Context& context) const {
    const Tensor logits = context.input(0);
    const int64_t size = logits.last(), num_rows = logits.num_rows();
    require(logits.rank == 2 && size >= k_ && size <= 1 << 24 && logits.size() <= kMaxValues, "k logits are due in a row");
    const int64_t dims[2] = {num_rows, k_};
    float* values = static_cast<float*>(context.output(0, dims, 2));
    auto* ids = static_cast<int64_t*>(context.output(1, dims, 2));
    if (num_rows == 0 || !values || !ids) return;

    const Kernels& kernels = edge::kernels();
    const int num_blocks = int((size + kBlockValues - 1) / kBlockValues);
    const std::vector<float> none(static_cast<size_t>(num_blocks));
    std::vector<std::vector<float>> largest(static_cast<size_t>(num_rows), none);
    Claims blocks(int(num_rows) * num_blocks, kBlocksOfAPiece);
    auto find_largest = [&] {
        for (int first, last; blocks.next(first, last);) {
            for (int index = first; index < last; index++) {
                const int64_t row = index / num_blocks, block = index % num_blocks, start = block * kBlockValues;
                const int count = int(std::min<int64_t>(kBlockValues, size - start));
                largest[size_t(row)][size_t(block)] = kernels.largest(logits.floats() + row * size + start, count);
            }
        }
    };
    if (logits.size() <= kInlineValues) find_largest();
    else context.run_on_all_threads(find_largest);

    const auto select_row = [&](int64_t row) {
        float* row_values = values + row * k_;
        int64_t* row_ids = ids + row * k_;
        if (select(logits.floats() + row * size, size, largest[size_t(row)], k_, row_values, row_ids)) return;
        std::fill_n(row_values, k_, NAN);
        for (int i = 0; i < k_; i++) row_ids[i] = i;
    };
    Claims rows(static_cast<int>(num_rows));
    std::atomic<bool> out_of_memory{false};  // a thread of the pool must not throw
    auto select_rows = [&] {
        try {
            for (int first, last; rows.next(first, last);)
                for (int row = first; row < last; row++) select_row(row);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    };
    if (num_rows == 1) select_rows();
    else context.run_on_all_threads(select_rows);
    require(!out_of_memory, "out of memory");
}

}  // namespace edge
