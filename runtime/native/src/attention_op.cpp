#include "attention_op.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace edge {
namespace {

constexpr int kMaxHeads = 256;
constexpr int kMaxHeadDim = 1024;
constexpr int kSmallTokens = 2;        // preparing so few takes less than handing them to other threads
constexpr int kWaveSegments = 64;      // partial results that are held at once for each tile
constexpr int64_t kMaxRows = 1 << 24;  // of a KV array: a float32 counts them exactly

// Queries of one KV head, 8 or 16 of them in the lanes of vectors: query q is token q / group, head q % group.
struct Tile {
    int kv_head, first_query, num_queries, num_lanes;
    float* queries;  // [head_dim][num_lanes]
    float first_visible[kMaxQueryRows], last_visible[kMaxQueryRows];
    int first_row, last_row;  // rows that some query sees, the last one included
};

// An AttentionState in one stretch of memory.
size_t state_floats(int head_dim) { return size_t(kMaxQueryRows) * size_t(head_dim + 2); }

AttentionState state_at(float* memory) { return {memory, memory + kMaxQueryRows, memory + 2 * kMaxQueryRows}; }

AttentionState empty_state_at(float* memory, int head_dim) {
    const AttentionState state = state_at(memory);
    std::fill_n(state.largest, kMaxQueryRows, -1e30f);
    std::fill_n(state.sum, kMaxQueryRows, 0.0f);
    std::fill_n(state.output, size_t(head_dim) * kMaxQueryRows, 0.0f);
    return state;
}

}  // namespace

void Rotary::compute(const Context& context) const {
    const Tensor positions = context.input(0), frequencies = context.input(1);
    const int64_t num_tokens = positions.size(), half = frequencies.size(), dims[2] = {num_tokens, half};
    require(num_tokens <= kMaxRows && half <= kMaxHeadDim, "too many positions or frequencies");
    float* cos = static_cast<float*>(context.output(0, dims, 2));
    float* sin = static_cast<float*>(context.output(1, dims, 2));
    if (num_tokens == 0 || !cos || !sin) return;
    Claims claims(static_cast<int>(num_tokens));
    auto work = [&] {
        for (int first, last; claims.next(first, last);) {
            for (int64_t i = first * half; i < last * half; i++) {
                const float angle = float(positions.integers()[i / half]) * frequencies.floats()[i % half];
                cos[i] = std::cos(angle);
                sin[i] = std::sin(angle);
            }
        }
    };
    if (num_tokens <= 4 * kSmallTokens) work();
    else context.run_on_all_threads(work);
}

CachedAttention::CachedAttention(const Attributes& attributes)
    : num_heads_(attributes.integer("num_heads", 1, kMaxHeads)),
      num_kv_heads_(attributes.integer("num_kv_heads", 1, kMaxHeads)),
      window_(attributes.integer("window", 0, kMaxRows)),
      epsilon_(attributes.number("epsilon")) {
    require(num_heads_ % num_kv_heads_ == 0, "num_heads is no multiple of num_kv_heads");
}

// One run: its inputs, checked, and the queries in tiles.
class CachedAttention::Call {
   public:
    Call(const CachedAttention& op, const Context& context) : op_(op), context_(context) {
        read_activations();
        read_rows();
        for (int head = 0; head < op_.num_kv_heads_; head++) {
            const Tensor keys = context.input(size_t(5 + 2 * head)), values = context.input(size_t(6 + 2 * head));
            require(keys.last() == head_dim_ && values.last() == head_dim_, "a KV row has another size than head_dim");
            require(stop_ <= std::min(keys.num_rows(), values.num_rows()), "rows lie outside of the KV arrays");
            keys_[head] = static_cast<float*>(keys.data);
            values_[head] = static_cast<float*>(values.data);
        }
    }

    int num_tokens() const { return num_tokens_; }
    int head_dim() const { return head_dim_; }

    void run(float* y) {
        static thread_local Scratch scratch;
        const size_t queries = size_t(num_tiles()) * size_t(head_dim_) * kMaxQueryRows;
        const bool by_segment = size_t(num_tiles()) < 2 * std::min<size_t>(Context::max_threads(), 16);
        const size_t states = by_segment ? size_t(num_tiles()) * (kWaveSegments + 1) * state_floats(head_dim_) : 0;
        auto* memory = static_cast<float*>(scratch.get(sizeof(float) * (queries + states)));
        std::fill_n(memory, queries, 0.0f);
        make_tiles(memory);
        prepare();
        if (by_segment) attend_by_segment(memory + queries, y);
        else attend_by_tile(y);
        require(!out_of_memory_, "out of memory");
    }

   private:
    void read_activations() {
        x_ = context_.input(0);
        norms_ = context_.input(1);
        cos_ = context_.input(2);
        sin_ = context_.input(3);
        const int64_t dim = norms_.last();
        require(norms_.rank == 2 && dim >= 2 && dim <= kMaxHeadDim && dim % 2 == 0 &&
                    (norms_.dims[0] == 1 || norms_.dims[0] == 2),
                "norms must be [1 or 2, head_dim], head_dim even");
        head_dim_ = int(dim);
        owns_kv_ = norms_.dims[0] == 2;
        require(x_.last() == (op_.num_heads_ + (owns_kv_ ? 2 * op_.num_kv_heads_ : 0)) * dim,
                "x has another width than its heads");
        require(x_.num_rows() <= kMaxRows, "x has too many rows");
        num_tokens_ = int(x_.num_rows());
        group_ = op_.num_heads_ / op_.num_kv_heads_;
        require(cos_.size() == num_tokens_ * dim / 2 && sin_.size() == cos_.size(),
                "cos and sin must be [rows of x, head_dim / 2]");
    }

    void read_rows() {
        const Tensor rows = context_.input(4);
        require(rows.size() == 3, "rows must be (start, stop, position of start)");
        require(context_.num_inputs() == size_t(5 + 2 * op_.num_kv_heads_), "keys and values are due for each KV head");
        const int64_t start = rows.integers()[0], stop = rows.integers()[1], position = rows.integers()[2];
        require(0 <= start && start <= stop && stop <= kMaxRows, "rows lie outside of the KV arrays");
        require(stop - start >= num_tokens_, "rows are fewer than tokens");
        require(0 <= position && position <= kMaxRows, "the position of the first row is out of range");
        start_ = int(start);
        stop_ = int(stop);
        position_ = int(position);
    }

    int num_tiles() const { return tiles_of_a_kv_head() * op_.num_kv_heads_; }
    int tiles_of_a_kv_head() const { return (num_tokens_ * group_ + kMaxQueryRows - 1) / kMaxQueryRows; }
    int first_new_row() const { return stop_ - num_tokens_; }

    // Segments begin at multiples of kSegmentKeys tokens, wherever their rows lie in the arrays: so a query's sums
    // are made of the same pieces in every call.
    int segment_of(int row) const { return (position_ + row - start_) / kSegmentKeys; }
    int segment_start(int segment) const { return std::max(start_, segment * kSegmentKeys - position_ + start_); }
    int segment_stop(int segment) const { return std::min(stop_, (segment + 1) * kSegmentKeys - position_ + start_); }

    void make_tiles(float* memory) {
        const int num_queries = num_tokens_ * group_;
        for (int kv_head = 0; kv_head < op_.num_kv_heads_; kv_head++) {
            for (int first = 0; first < num_queries; first += kMaxQueryRows) {
                tiles_.push_back(make_tile(kv_head, first, std::min(kMaxQueryRows, num_queries - first), memory));
                memory += size_t(head_dim_) * kMaxQueryRows;
            }
        }
    }

    Tile make_tile(int kv_head, int first_query, int num_queries, float* memory) const {
        Tile tile{kv_head, first_query, num_queries, num_queries <= 8 ? 8 : 16, memory, {}, {}, stop_, 0};
        for (int lane = 0; lane < kMaxQueryRows; lane++) {
            if (lane >= num_queries) {  // sees nothing
                tile.first_visible[lane] = 1.0f;
                tile.last_visible[lane] = 0.0f;
                continue;
            }
            const int last = first_new_row() + (first_query + lane) / group_;
            const int first = op_.window_ ? std::max(start_, last - op_.window_ + 1) : start_;
            tile.first_visible[lane] = float(first);
            tile.last_visible[lane] = float(last);
            tile.first_row = std::min(tile.first_row, first);
            tile.last_row = std::max(tile.last_row, last);
        }
        return tile;
    }

    void prepare() {
        Claims tokens(num_tokens_);
        auto work = [&] {
            for (int first, last; tokens.next(first, last);)
                for (int token = first; token < last; token++) prepare_token(token);
        };
        if (num_tokens_ <= kSmallTokens) work();
        else context_.run_on_all_threads(work);
    }

    // Norms and rotation; queries go to their tiles, new keys and values to their arrays.
    void prepare_token(int token) const {
        const Kernels& k = kernels_;
        const int dim = head_dim_;
        const float* head = x_.floats() + size_t(token) * size_t(x_.last());
        const float* cos = cos_.floats() + size_t(token) * size_t(dim / 2);
        const float* sin = sin_.floats() + size_t(token) * size_t(dim / 2);
        float query[kMaxHeadDim];
        for (int h = 0; h < op_.num_heads_; h++, head += dim) {
            k.norm_rotate(head, norms_.floats(), dim, op_.epsilon_, cos, sin, query);
            const int index = token * group_ + h % group_;
            const Tile& tile = tiles_[size_t(h / group_ * tiles_of_a_kv_head() + index / kMaxQueryRows)];
            float* lane = tile.queries + index % kMaxQueryRows;
            for (int d = 0; d < dim; d++) lane[d * tile.num_lanes] = query[d];
        }
        if (!owns_kv_) return;
        const size_t place = size_t(first_new_row() + token) * size_t(dim);
        for (int h = 0; h < op_.num_kv_heads_; h++, head += dim)
            k.norm_rotate(head, norms_.floats() + dim, dim, op_.epsilon_, cos, sin, keys_[h] + place);
        for (int h = 0; h < op_.num_kv_heads_; h++, head += dim)
            k.norm_rotate(head, nullptr, dim, op_.epsilon_, nullptr, nullptr, values_[h] + place);
    }

    void attend(const Tile& tile, int segment, float* scores, const AttentionState& result) const {
        const int first = segment_start(segment), last = segment_stop(segment);
        bool all_visible = true;
        for (int lane = 0; lane < tile.num_queries; lane++)
            all_visible &= tile.first_visible[lane] <= float(first) && tile.last_visible[lane] >= float(last - 1);
        const size_t place = size_t(first) * size_t(head_dim_);
        kernels_.attend({tile.queries, tile.num_lanes, head_dim_, keys_[tile.kv_head] + place, values_[tile.kv_head] + place,
                         last - first, first, tile.first_visible, tile.last_visible, all_visible},
                        scores, result);
    }

    // Many tiles: each thread takes whole ones.
    void attend_by_tile(float* y) {
        Claims claims(num_tiles());
        auto work = [&] {
            float* memory = thread_memory();
            if (!memory) return;
            for (int first, last; claims.next(first, last);) {
                for (int index = first; index < last; index++) {
                    const Tile& tile = tiles_[size_t(index)];
                    float* scores = memory + 2 * state_floats(head_dim_);
                    const AttentionState part = state_at(memory);
                    const AttentionState state = empty_state_at(memory + state_floats(head_dim_), head_dim_);
                    for (int segment = segment_of(tile.first_row); segment <= segment_of(tile.last_row); segment++) {
                        attend(tile, segment, scores, part);
                        kernels_.merge(state, part, head_dim_, tile.num_lanes);
                    }
                    write(tile, state, y);
                }
            }
        };
        context_.run_on_all_threads(work);
    }

    // Few tiles: threads share the segments, in waves so that partial results stay bounded. Merged in the same order.
    void attend_by_segment(float* memory, float* y) {
        const size_t size = state_floats(head_dim_);
        float* parts = memory + size_t(num_tiles()) * size;
        for (int index = 0; index < num_tiles(); index++) empty_state_at(memory + size_t(index) * size, head_dim_);
        const int last_segment = segment_of(stop_ - 1);
        for (int wave = segment_of(start_); wave <= last_segment; wave += kWaveSegments) {
            const int num_segments = std::min(kWaveSegments, last_segment + 1 - wave);
            const auto part = [&](int index, int offset) {
                return state_at(parts + (size_t(index) * kWaveSegments + size_t(offset)) * size);
            };
            Claims claims(num_segments * num_tiles());
            auto work = [&] {
                float* scores = thread_memory();
                if (!scores) return;
                for (int first, last; claims.next(first, last);)
                    for (int piece = first; piece < last; piece++)
                        attend(tiles_[size_t(piece % num_tiles())], wave + piece / num_tiles(), scores,
                               part(piece % num_tiles(), piece / num_tiles()));
            };
            if (num_segments * num_tiles() == 1) work();
            else context_.run_on_all_threads(work);
            if (out_of_memory_) return;
            for (int index = 0; index < num_tiles(); index++)
                for (int offset = 0; offset < num_segments; offset++)
                    kernels_.merge(state_at(memory + size_t(index) * size), part(index, offset), head_dim_,
                                   tiles_[size_t(index)].num_lanes);
        }
        for (int index = 0; index < num_tiles(); index++)
            write(tiles_[size_t(index)], state_at(memory + size_t(index) * size), y);
    }

    // Two states and the scores of one tile; null, and noted, where there is no memory.
    float* thread_memory() {
        static thread_local Scratch scratch;
        try {
            const size_t scores = size_t(kSegmentKeys) * kMaxQueryRows;
            return static_cast<float*>(scratch.get(sizeof(float) * (2 * state_floats(head_dim_) + scores)));
        } catch (const std::bad_alloc&) {
            out_of_memory_ = true;
            return nullptr;
        }
    }

    void write(const Tile& tile, const AttentionState& state, float* y) const {
        for (int lane = 0; lane < tile.num_queries; lane++) {
            const int query = tile.first_query + lane, token = query / group_;
            const int head = tile.kv_head * group_ + query % group_;
            float* row = y + (size_t(token) * size_t(op_.num_heads_) + size_t(head)) * size_t(head_dim_);
            const float inverse = 1.0f / state.sum[lane];
            for (int d = 0; d < head_dim_; d++) row[d] = state.output[d * tile.num_lanes + lane] * inverse;
        }
    }

    const CachedAttention& op_;
    const Context& context_;
    const Kernels& kernels_ = edge::kernels();
    Tensor x_, norms_, cos_, sin_;
    int num_tokens_ = 0, head_dim_ = 0, group_ = 1;
    bool owns_kv_ = false;
    int start_ = 0, stop_ = 0, position_ = 0;  // rows [start, stop), `position` is the token of row `start`
    float *keys_[kMaxHeads], *values_[kMaxHeads];
    std::vector<Tile> tiles_;
    std::atomic<bool> out_of_memory_{false};
};

void CachedAttention::compute(const Context& context) const {
    Call call(*this, context);
    const int64_t dims[2] = {call.num_tokens(), int64_t(num_heads_) * call.head_dim()};
    float* y = static_cast<float*>(context.output(0, dims, 2));
    if (call.num_tokens() > 0 && y) call.run(y);
}

}  // namespace edge
