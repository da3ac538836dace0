#include "row_ops.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace edge {
namespace {

constexpr int64_t kMaxValues = 1ll << 31;
constexpr int64_t kInlineValues = 16384;  // fewer take less than handing them to other threads

struct Candidate {
    float value;
    int64_t id;
    // the better one first
    bool operator<(const Candidate& other) const { return value != other.value ? value > other.value : id < other.id; }
};

// The best `limit` candidates seen so far, as a heap with the worst on top.
class Best {
   public:
    explicit Best(size_t limit) : limit_(limit) { heap_.reserve(limit + 1); }

    void offer(const Candidate& candidate) {
        if (heap_.size() == limit_) {
            if (!(candidate < heap_.front())) return;
            std::pop_heap(heap_.begin(), heap_.end());
            heap_.pop_back();
        }
        heap_.push_back(candidate);
        std::push_heap(heap_.begin(), heap_.end());
    }

    // No candidate of this value or below gets in any more, ids only growing.
    float bar() const { return heap_.size() < limit_ ? -INFINITY : heap_.front().value; }
    bool is_full() const { return heap_.size() == limit_; }
    std::vector<Candidate>& candidates() { return heap_; }

   private:
    size_t limit_;
    std::vector<Candidate> heap_;
};

constexpr int kSliceValues = 8192;  // of a row, scanned by one thread
constexpr int kStepValues = 64;     // looked at together

// The best of one slice; false where it holds a NaN.
bool scan(const float* logits, int first, int last, const Kernels& kernels, Best& best) {
    for (int start = first; start < last; start += kStepValues) {
        const int count = std::min(kStepValues, last - start);
        if (best.is_full() && !kernels.any_above(logits + start, count, best.bar())) continue;
        for (int i = start; i < start + count; i++) {
            if (std::isnan(logits[i])) return false;
            best.offer({logits[i], i});
        }
    }
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
    const int num_slices = int((size + kSliceValues - 1) / kSliceValues);
    const int slices_of_a_piece = std::max(1, num_slices / 4), pieces = (num_slices + slices_of_a_piece - 1) / slices_of_a_piece;
    std::vector<Best> best(size_t(num_rows) * size_t(pieces), Best(size_t(k_)));
    for (Best& each : best) each.candidates().reserve(size_t(k_) + 1);  // threads must not allocate
    std::vector<char> is_number(best.size(), 1);
    Claims claims(int(num_rows) * pieces);
    auto work = [&] {
        for (int first, last; claims.next(first, last);) {
            for (int piece = first; piece < last; piece++) {
                const int64_t row = piece / pieces, start = int64_t(piece % pieces) * slices_of_a_piece * kSliceValues;
                const int64_t stop = std::min(size, start + int64_t(slices_of_a_piece) * kSliceValues);
                is_number[size_t(piece)] =
                    scan(logits.floats() + row * size, int(start), int(stop), kernels, best[size_t(piece)]);
            }
        }
    };
    if (logits.size() <= kInlineValues) work();
    else context.run_on_all_threads(work);

    std::vector<Candidate> all;
    for (int64_t row = 0; row < num_rows; row++) {
        all.clear();
        bool numbers = true;
        for (int piece = 0; piece < pieces; piece++) {
            const size_t index = size_t(row) * size_t(pieces) + size_t(piece);
            numbers &= is_number[index] != 0;
            all.insert(all.end(), best[index].candidates().begin(), best[index].candidates().end());
        }
        if (numbers) std::partial_sort(all.begin(), all.begin() + k_, all.end());
        for (int i = 0; i < k_; i++) {
            values[row * k_ + i] = numbers ? all[size_t(i)].value : NAN;
            ids[row * k_ + i] = numbers ? all[size_t(i)].id : i;
        }
    }
}

}  // namespace edge
