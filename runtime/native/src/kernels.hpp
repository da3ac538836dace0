// The arithmetic, one table of functions for each instruction set. Nothing here knows of ONNX Runtime or threads.
//
// Law: a row's result does not depend on how many rows there are, nor on the instruction set's tile sizes.
#pragma once
#include "matrix.hpp"

namespace edge {

constexpr int kMaxTileRows = 8;
constexpr int kSegmentKeys = 64;  // keys of one attention segment, aligned to absolute positions
constexpr int kMaxQueryRows = 16;  // queries of one attention tile: (token, head) pairs that share a KV head

// Rows of activations, quantized to int8 with a scale for each row and block and interleaved as `multiply` reads them.
struct QuantizedTile {
    int32_t* words;    // [padded_width / 4][num_rows]: 4 codes of a row; in a block an instruction set may reorder them
    float* scales;     // [num_blocks][num_rows]
    int32_t* offsets;  // [num_blocks][num_rows]: -middle * sum of the block's codes
};

// Queries of one KV head and a segment of its keys, `num_queries` rows in the lanes of a vector.
struct AttentionSegment {
    const float* queries;  // [head_dim][num_query_lanes]
    int num_query_lanes;   // 8 or 16; lanes without a query hold zeros and see no key
    int head_dim;
    const float* keys;     // [num_keys][head_dim]
    const float* values;   // [num_keys][head_dim]
    int num_keys;          // at most kSegmentKeys
    int first_key;         // row of keys[0], as first_visible and last_visible count
    const float* first_visible;  // [num_query_lanes] row of the first key that each query sees
    const float* last_visible;   // [num_query_lanes] row of the last one
    bool all_visible;            // every query sees every key: no masks needed
};

// Softmax numerators of some keys: sum and output are relative to the largest score.
struct AttentionState {
    float* largest;  // [num_query_lanes]
    float* sum;      // [num_query_lanes]
    float* output;   // [head_dim][num_query_lanes]
};

struct Kernels {
    const char* name;
    int max_single_tile_rows;  // up to this many rows make one tile
    int num_tile_rows;         // else tiles of this many rows, the last one smaller

    // Quantizes blocks [first_block, last_block) of up to kMaxTileRows rows; beyond `shape.width` rows count as zero.
    void (*quantize)(const float* x, size_t row_stride, int num_rows, const MatrixShape& shape, int first_block,
                     int last_block, const QuantizedTile& tile);
    // y[num_rows][kPanelRows] = rows times one panel.
    void (*multiply)(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y);

    // y = gelu_tanh(x) * other
    void (*gelu_multiply)(const float* x, const float* other, float* y, int count);
    // y = cap * tanh(x / cap)
    void (*softcap)(const float* x, float cap, float* y, int count);
    // total = scale * (residual + rms_norm(x) * weight); where next_weight: normed = rms_norm(total) * next_weight
    void (*norm_add)(const float* x, const float* weight, const float* residual, int size, float epsilon, float scale,
                     float* total, const float* next_weight, float next_epsilon, float* normed);
    // y = rms_norm(x) * weight, no weight where it is null; then, where cos: rotary on its halves
    void (*norm_rotate)(const float* x, const float* weight, int size, float epsilon, const float* cos,
                        const float* sin, float* y);
    // Softmax numerators of one segment; `scores` is scratch [kSegmentKeys][num_query_lanes].
    void (*attend)(const AttentionSegment& segment, float* scores, const AttentionState& result);
    // state += other, as if their keys had been one list.
    void (*merge)(const AttentionState& state, const AttentionState& other, int head_dim, int num_query_lanes);
    // The largest x, NaN where there is one.
    float (*largest)(const float* x, int count);
};

// Null where the library was built for another architecture.
extern const Kernels* const kAvx512Vnni;
extern const Kernels* const kAvxVnni;
extern const Kernels* const kAvx512Vnni256;  // kAvxVnni in another encoding: only where it is forced
extern const Kernels* const kAvx2;
extern const Kernels* const kNeonI8mm;
extern const Kernels* const kNeonDotprod;
extern const Kernels* const kScalar;

// The best that this processor runs, or the one that was forced.
const Kernels& kernels();
// Forces one by name, null for the best; false where this build or processor has it not.
bool force_kernels(const char* name);
// All that this processor runs, from 0 on; null behind the last.
const Kernels* runnable_kernels(int index);

}  // namespace edge
