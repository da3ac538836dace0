#include "attention_op.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace edge {
namespace {

constexpr int kMaxHeads = 256;
constexpr int kMaxHeadDim = 1024;
constexpr int kSmallTokens = 8;        // preparing so few takes less than handing them to other threads
constexpr int kSharingTiles = 16;      // so few are attended to segment by segment; of more, each thread takes its own
constexpr int kWaveStates = 256;       // partial results that are held at once
constexpr int kTilesAtOnce = 4;        // of one thread's own, for which a segment's rows stay in the cache
constexpr int64_t kMaxRows = 1 << 24;  // of a KV array
constexpr float kEmptyScore = -1e30f;  // below any score; finite, so that differences of two are numbers

// The queries of one token that share a KV head, at most kTileQueries of them.
struct Tile {
    int kv_head, token, first_head, num_queries;
    int first_row, stop_row;  // rows that the token sees
};

int padded(int head_dim) { return (head_dim + kRowFloats - 1) / kRowFloats * kRowFloats; }

// An AttentionState in one stretch of memory.
size_t state_floats(int head_dim) { return size_t(kTileQueries) * size_t(padded(head_dim) + 2); }

AttentionState state_at(float* memory) { return {memory, memory + kTileQueries, memory + 2 * kTileQueries}; }

AttentionState empty_state_at(float* memory, int head_dim) {
    const AttentionState state = state_at(memory);
    std::fill_n(state.largest, kTileQueries, kEmptyScore);
    std::fill_n(state.sum, kTileQueries, 0.0f);
    std::fill_n(state.output, size_t(padded(head_dim)) * kTileQueries, 0.0f);
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
    if (num_tokens <= kSmallTokens) work();
    else context.run_on_all_threads(work);
}

CachedAttention::CachedAttention(const Attributes& attributes)
    : num_heads_(attributes.integer("num_heads", 1, kMaxHeads)),
      num_kv_heads_(attributes.integer("num_kv_heads", 1, kMaxHeads)),
      window_(attributes.integer("window", 0, kMaxRows)),
      epsilon_(attributes.number("epsilon")) {
    require(num_heads_ % num_kv_heads_ == 0, "num_heads is no multiple of num_kv_heads");
}

// One run: its inputs, checked, and the queries in tiles. Whatever the other tokens are, a query is computed from the
// same pieces in the same order.
class CachedAttention::Call {
   public:
    Call(const CachedAttention& op, const Context& context) : op_(op), context_(context) {
        read_activations();
        read_rows();
        type_ = type_of(context.input(5).last());
        for (int head = 0; head < op_.num_kv_heads_; head++) {
            keys_[head] = read_cache(context.input(size_t(5 + 2 * head)));
            values_[head] = read_cache(context.input(size_t(6 + 2 * head)));
        }
    }

    int num_tokens() const { return num_tokens_; }
    int head_dim() const { return head_dim_; }

    void run(float* y) {
        static thread_local Scratch scratch;
        make_tiles();
        const bool is_shared = num_tiles() <= kSharingTiles;
        const size_t queries = size_t(num_tiles()) * tile_rows() * size_t(padded(head_dim_));
        const size_t states = is_shared ? size_t(num_tiles() + kWaveStates) * state_floats(head_dim_) : 0;
        queries_ = static_cast<float*>(scratch.get(sizeof(float) * (queries + states)));
        std::fill_n(queries_, queries, 0.0f);
        prepare();
        if (is_shared) attend_by_segment(queries_ + queries, y);
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

    // Of two values a row has the same size in float16 and int8; it is float16, whoever asks.
    KvType type_of(int64_t row_bytes) const {
        for (const KvType type : {KvType::float32, KvType::float16, KvType::int8})
            if (row_bytes == kv_row_bytes(type, head_dim_)) return type;
        throw OpError("a KV row has another size than head_dim values take in any type");
    }

    uint8_t* read_cache(const Tensor& array) const {
        require(array.rank == 2 && array.last() == row_bytes(), "KV rows differ in size");
        require(stop_ <= array.num_rows(), "rows lie outside of the KV arrays");
        require(reinterpret_cast<uintptr_t>(array.data) % alignof(float) == 0, "KV rows are not aligned to 4 bytes");
        return static_cast<uint8_t*>(array.data);
    }

    int row_bytes() const { return kv_row_bytes(type_, head_dim_); }
    int num_tiles() const { return int(tiles_.size()); }
    int tiles_of_a_kv_head() const { return (group_ + kTileQueries - 1) / kTileQueries; }
    size_t tile_rows() const { return group_ <= kSmallTileQueries ? kSmallTileQueries : kTileQueries; }
    float* queries_of(int tile) const { return queries_ + size_t(tile) * tile_rows() * size_t(padded(head_dim_)); }
    int first_new_row() const { return stop_ - num_tokens_; }

    // Segments begin at multiples of segment_keys() tokens, wherever their rows lie in the arrays: so a query's sums
    // are made of the same pieces in every call.
    int segment_keys() const { return op_.window_ ? kWindowSegmentKeys : kMaxSegmentKeys; }
    int segment_of(int row) const { return (position_ + row - start_) / segment_keys(); }
    int segment_start(int segment) const { return std::max(start_, segment * segment_keys() - position_ + start_); }
    int segment_stop(int segment) const { return std::min(stop_, (segment + 1) * segment_keys() - position_ + start_); }

    // In the order of tokens.
    void make_tiles() {
        tiles_.reserve(size_t(num_tokens_) * size_t(op_.num_kv_heads_) * size_t(tiles_of_a_kv_head()));
        for (int token = 0; token < num_tokens_; token++) {
            const int last = first_new_row() + token;
            const int first = op_.window_ ? std::max(start_, last - op_.window_ + 1) : start_;
            for (int kv_head = 0; kv_head < op_.num_kv_heads_; kv_head++)
                for (int offset = 0; offset < group_; offset += kTileQueries)
                    tiles_.push_back({kv_head, token, kv_head * group_ + offset,
                                      std::min(kTileQueries, group_ - offset), first, last + 1});
        }
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
        float row[kMaxHeadDim];
        for (int h = 0; h < op_.num_heads_; h++, head += dim) {
            const int kv_head = h / group_, offset = h % group_;
            const int tile = (token * op_.num_kv_heads_ + kv_head) * tiles_of_a_kv_head() + offset / kTileQueries;
            float* query = queries_of(tile) + size_t(offset % kTileQueries) * size_t(padded(dim));
            k.norm_rotate(head, norms_.floats(), dim, op_.epsilon_, cos, sin, query);
        }
        if (!owns_kv_) return;
        const size_t place = size_t(first_new_row() + token) * size_t(row_bytes());
        for (int h = 0; h < op_.num_kv_heads_; h++, head += dim) {
            k.norm_rotate(head, norms_.floats() + dim, dim, op_.epsilon_, cos, sin, row);
            k.store_row(row, dim, type_, keys_[h] + place);
        }
        for (int h = 0; h < op_.num_kv_heads_; h++, head += dim) {
            k.norm_rotate(head, nullptr, dim, op_.epsilon_, nullptr, nullptr, row);
            k.store_row(row, dim, type_, values_[h] + place);
        }
    }

    // What a tile sees of a segment; an empty state where that is nothing.
    void attend(int index, int segment, bool reads_ahead, float* scores, const AttentionState& result) const {
        const Tile& tile = tiles_[size_t(index)];
        const int first = std::max(tile.first_row, segment_start(segment));
        const int stop = std::min(tile.stop_row, segment_stop(segment));
        if (first >= stop) {
            std::fill_n(result.sum, kTileQueries, 0.0f);
            return;
        }
        const size_t place = size_t(first) * size_t(row_bytes());
        kernels_.attend({queries_of(index), tile.num_queries, head_dim_, padded(head_dim_), type_,
                         keys_[tile.kv_head] + place, values_[tile.kv_head] + place, stop - first, reads_ahead},
                        scores, result);
    }

    // Adds a segment's part to one query's state; nothing where the query sees none of the segment.
    void merge(const AttentionState& state, const AttentionState& part, int query) const {
        if (part.sum[query] == 0.0f) return;  // the largest score alone adds 1
        const float largest = std::max(state.largest[query], part.largest[query]);
        const float keep = std::exp(state.largest[query] - largest), take = std::exp(part.largest[query] - largest);
        const size_t row = size_t(query) * size_t(padded(head_dim_));
        state.largest[query] = largest;
        state.sum[query] = state.sum[query] * keep + part.sum[query] * take;
        kernels_.scale_add(part.output + row, keep, take, state.output + row, head_dim_);
    }

    // Many tiles: each thread takes whole ones.
    void attend_by_tile(float* y) {
        Claims claims((num_tiles() + kTilesAtOnce - 1) / kTilesAtOnce);
        auto work = [&] {
            float* memory = thread_memory();
            if (!memory) return;
            for (int first, last; claims.next(first, last);)
                for (int some = first; some < last; some++)
                    attend_tiles(some * kTilesAtOnce, std::min((some + 1) * kTilesAtOnce, num_tiles()), memory, y);
        };
        context_.run_on_all_threads(work);
    }

    void attend_tiles(int first_tile, int last_tile, float* memory, float* y) const {
        const size_t size = state_floats(head_dim_);
        const AttentionState part = state_at(memory);
        float *states = memory + size, *scores = states + kTilesAtOnce * size;
        int first_row = stop_, stop_row = 0;
        for (int tile = first_tile; tile < last_tile; tile++) {
            empty_state_at(states + size_t(tile - first_tile) * size, head_dim_);
            first_row = std::min(first_row, tiles_[size_t(tile)].first_row);
            stop_row = std::max(stop_row, tiles_[size_t(tile)].stop_row);
        }
        for (int segment = segment_of(first_row); segment <= segment_of(stop_row - 1); segment++) {
            for (int tile = first_tile; tile < last_tile; tile++) {
                attend(tile, segment, false, scores, part);
                const AttentionState state = state_at(states + size_t(tile - first_tile) * size);
                for (int query = 0; query < tiles_[size_t(tile)].num_queries; query++) merge(state, part, query);
            }
        }
        for (int tile = first_tile; tile < last_tile; tile++) {
            const AttentionState state = state_at(states + size_t(tile - first_tile) * size);
            for (int query = 0; query < tiles_[size_t(tile)].num_queries; query++) write(tile, query, state, y);
        }
    }

    // Few tiles: threads share the segments, in waves so that partial results stay bounded, then the queries, to merge
    // what the segments gave. Always in the order of the keys.
    void attend_by_segment(float* memory, float* y) {
        const size_t size = state_floats(head_dim_);
        const int tiles = num_tiles(), wave_segments = kWaveStates / tiles, last_segment = segment_of(stop_ - 1);
        float* parts = memory + size_t(tiles) * size;
        for (int tile = 0; tile < tiles; tile++) empty_state_at(memory + size_t(tile) * size, head_dim_);
        for (int wave = segment_of(start_); wave <= last_segment; wave += wave_segments) {
            const int num_parts = std::min(wave_segments, last_segment + 1 - wave) * tiles;
            const bool is_last = wave + wave_segments > last_segment;
            Claims segments(num_parts), queries(tiles * kTileQueries);
            Phase attended(num_parts);
            auto work = [&] {
                float* scores = thread_memory();
                for (int first, last; segments.next(first, last); attended.done(last - first))
                    for (int part = first; part < last && scores; part++)
                        attend(part % tiles, wave + part / tiles, tiles_[size_t(part % tiles)].token == 0, scores,
                               state_at(parts + size_t(part) * size));
                attended.wait();
                if (out_of_memory_) return;
                for (int first, last; queries.next(first, last);) {
                    for (int query = first; query < last; query++) {
                        const int tile = query / kTileQueries, lane = query % kTileQueries;
                        if (lane >= tiles_[size_t(tile)].num_queries) continue;
                        const AttentionState state = state_at(memory + size_t(tile) * size);
                        for (int part = tile; part < num_parts; part += tiles)
                            merge(state, state_at(parts + size_t(part) * size), lane);
                        if (is_last) write(tile, lane, state, y);
                    }
                }
            };
            if (num_parts == 1) work();
            else context_.run_on_all_threads(work);
            if (out_of_memory_) return;
        }
    }

    // Scores, behind the states of the tiles at once and one part; null, and noted, where there is no memory.
    float* thread_memory() {
        static thread_local Scratch scratch;
        try {
            const size_t floats = (kTilesAtOnce + 1) * state_floats(head_dim_) + kScoreFloats;
            return static_cast<float*>(scratch.get(sizeof(float) * floats));
        } catch (const std::bad_alloc&) {
            out_of_memory_ = true;
            return nullptr;
        }
    }

    void write(int tile, int query, const AttentionState& state, float* y) const {
        const size_t head = size_t(tiles_[size_t(tile)].first_head + query);
        float* row = y + (size_t(tiles_[size_t(tile)].token) * size_t(op_.num_heads_) + head) * size_t(head_dim_);
        const float* output = state.output + size_t(query) * size_t(padded(head_dim_));
        const float inverse = 1.0f / state.sum[query];
        for (int d = 0; d < head_dim_; d++) row[d] = output[d] * inverse;
    }

    const CachedAttention& op_;
    const Context& context_;
    const Kernels& kernels_ = edge::kernels();
    Tensor x_, norms_, cos_, sin_;
    int num_tokens_ = 0, head_dim_ = 0, group_ = 1;
    bool owns_kv_ = false;
    int start_ = 0, stop_ = 0, position_ = 0;  // rows [start, stop), `position` is the token of row `start`
    KvType type_ = KvType::float16;
    uint8_t *keys_[kMaxHeads], *values_[kMaxHeads];
    float* queries_ = nullptr;  // [tile][tile_rows()][padded head_dim]
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
