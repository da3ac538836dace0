// The arithmetic, one table of functions for each instruction set. Nothing here knows of ONNX Runtime or threads.
//
// Law: a row's result does not depend on how many rows there are, nor on the instruction set's tile sizes.
#pragma once
#include "matrix.hpp"

namespace edge {

constexpr int kMaxTileRows = 8;

// Keys of one attention segment, aligned to absolute positions: in a window so few that it has work for several
// threads, else more, since every segment's partial result is written and read again.
constexpr int kWindowSegmentKeys = 64;
constexpr int kMaxSegmentKeys = 128;
constexpr int kTileQueries = 8;       // of one attention tile: heads of one token that share a KV head
constexpr int kSmallTileQueries = 4;  // of a tile that takes half the work
constexpr int kRowFloats = 16;        // rows of queries are padded to a multiple, for the widest vectors
constexpr int kScoreFloats = (kMaxSegmentKeys + kTileQueries) * kTileQueries;  // keys are scored several at once

// Rows of activations, quantized to int8 with a scale for each row and block and interleaved as `multiply` reads them.
struct QuantizedTile {
    int32_t* words;    // [padded_width / 4][num_rows]: 4 codes of a row; in a block an instruction set may reorder them
    float* scales;     // [num_blocks][num_rows]
    int32_t* offsets;  // [num_blocks][num_rows]: -middle * sum of the block's codes
};

// What a row of the KV cache holds: floats, halves, or int8 codes with a float16 scale behind them for each block of
// kKvBlock values, the last of which may be shorter.
enum class KvType { float32, float16, int8 };
constexpr int kKvBlock = 64;

constexpr int kv_row_bytes(KvType type, int head_dim) {
    return type == KvType::float32   ? 4 * head_dim
           : type == KvType::float16 ? 2 * head_dim
                                     : head_dim + 2 * ((head_dim + kKvBlock - 1) / kKvBlock);
}

// The queries of one token that share a KV head, and those keys of one segment that the token sees.
struct AttentionSegment {
    const float* queries;  // [kSmallTileQueries or kTileQueries][row_size], zeros behind head_dim values
    int num_queries;       // rows behind these are read too, whatever they hold
    int head_dim;
    int row_size;           // of queries and outputs: head_dim, rounded up to a multiple of kRowFloats
    KvType type;            // of keys and values
    const uint8_t* keys;    // [num_keys] rows
    const uint8_t* values;  // [num_keys] rows
    int num_keys;           // 1 to kMaxSegmentKeys
    bool reads_ahead;       // nobody has read these rows just now
};

// Softmax numerators of some keys: sum and output are relative to the largest score.
struct AttentionState {
    float* largest;  // [kTileQueries]
    float* sum;      // [kTileQueries]
    float* output;   // [kTileQueries][row_size]
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
    // A row of the KV cache; each value goes to the nearest one that the type has, halfway cases to even. Of int8 a
    // block with a NaN or an infinity has the scale NaN.
    void (*store_row)(const float* x, int head_dim, KvType type, uint8_t* row);
    // Softmax numerators of one segment; `scores` is scratch of kScoreFloats.
    void (*attend)(const AttentionSegment& segment, float* scores, const AttentionState& result);
    // y = keep * y + take * x
    void (*scale_add)(const float* x, float keep, float take, float* y, int count);
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
