// How a quantized matrix lies in memory: panels of 32 rows, made by runtime/panels.py.
//
//   panel 0 (matrix rows 0-31)          panel 1 (rows 32-63)   ...
//   +---------------------------------+
//   | block 0: 32 scales, float16     |  64 bytes, one for each row of the panel
//   |          word 0 of rows 0 .. 31 |  128 bytes
//   |          word 1 of rows 0 .. 31 |
//   |          ...                    |
//   | block 1: ...                    |
//
// A word is 4 bytes of one row: 8 codes of 4 bits (byte i: code 2i low nibble, code 2i + 1 high nibble) or 4 codes of 8
// bits. Codes are unsigned around 2^(bits-1). Rows are padded to whole panels and blocks; a padding row has scale 0.
#pragma once
#include <cstddef>
#include <cstdint>

namespace edge {

constexpr int kPanelRows = 32;

struct MatrixShape {
    int num_rows;    // outputs
    int width;       // inputs
    int bits;        // 4 or 8
    int block_size;  // weights of a row that share a scale, a multiple of 32

    int num_blocks() const { return (width + block_size - 1) / block_size; }
    int padded_width() const { return num_blocks() * block_size; }
    int num_panels() const { return (num_rows + kPanelRows - 1) / kPanelRows; }
    int middle() const { return 1 << (bits - 1); }
    size_t block_bytes() const { return kPanelRows * (2 + size_t(block_size) * bits / 8); }
    size_t panel_bytes() const { return num_blocks() * block_bytes(); }
    size_t bytes() const { return num_panels() * panel_bytes(); }
};

}  // namespace edge
