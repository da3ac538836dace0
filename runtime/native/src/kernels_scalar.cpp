// The plain reference: every other instruction set must give the same bits in `quantize` and `multiply`.
#include <cmath>
#include <cstring>

#include "float16.hpp"
#include "kernels.hpp"
#include "row_kernels.hpp"
#include "vec_scalar.hpp"

namespace {

using edge::kPanelRows;
using edge::MatrixShape;
using edge::QuantizedTile;

// Where code k of a row lies among the row's words.
int word_of(int bits, int k) { return bits == 8 ? k / 4 : k / 8 * 2 + k % 2; }
int byte_of(int bits, int k) { return bits == 8 ? k % 4 : k % 8 / 2; }

void quantize(const float* x, size_t row_stride, int num_rows, const MatrixShape& shape, int first_block,
              int last_block, const QuantizedTile& tile) {
    for (int row = 0; row < num_rows; row++) {
        for (int block = first_block; block < last_block; block++) {
            const float* values = x + size_t(row) * row_stride;
            const int start = block * shape.block_size;
            float largest = 0.0f, poison = 0.0f;  // poison: NaN where a value is NaN or infinite
            for (int k = start; k < start + shape.block_size && k < shape.width; k++) {
                largest = std::fabs(values[k]) > largest ? std::fabs(values[k]) : largest;
                poison += values[k] * 0.0f;
            }
            const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
            int sum = 0;
            for (int k = start; k < start + shape.block_size; k++) {
                const float value = k < shape.width && poison == 0.0f ? values[k] : 0.0f;
                const int code = int(__builtin_nearbyintf(value * inverse));
                sum += code;
                const int word = word_of(shape.bits, k);
                auto* bytes = reinterpret_cast<int8_t*>(tile.words + size_t(word) * size_t(num_rows) + row);
                bytes[byte_of(shape.bits, k)] = int8_t(code);
            }
            const size_t place = size_t(block) * size_t(num_rows) + size_t(row);
            tile.scales[place] = (largest > 1e-30f ? largest / 127.0f : 0.0f) + poison;
            tile.offsets[place] = -shape.middle() * sum;
        }
    }
}

int dot(const uint8_t* weights, const int8_t* codes) {
    int sum = 0;
    for (int i = 0; i < 4; i++) sum += int(weights[i]) * int(codes[i]);
    return sum;
}

// Sum of code * code of one row of x and one row of the panel, over one block's words.
int block_sum(const uint8_t* words, int column, const MatrixShape& shape, const int32_t* x, int num_rows) {
    const auto codes = [&](int word) { return reinterpret_cast<const int8_t*>(x + size_t(word) * size_t(num_rows)); };
    int sum = 0;
    for (int word = 0; word < shape.block_size * shape.bits / 32; word++) {
        const uint8_t* bytes = words + (size_t(word) * kPanelRows + size_t(column)) * 4;
        if (shape.bits == 8) {
            sum += dot(bytes, codes(word));
            continue;
        }
        uint8_t low[4], high[4];
        for (int i = 0; i < 4; i++) low[i] = bytes[i] & 15, high[i] = bytes[i] >> 4;
        sum += dot(low, codes(2 * word)) + dot(high, codes(2 * word + 1));
    }
    return sum;
}

void multiply(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    const size_t words_per_block = size_t(shape.block_size) / 4;
    std::memset(y, 0, sizeof(float) * size_t(num_rows) * kPanelRows);
    for (int block = 0; block < shape.num_blocks(); block++, panel += shape.block_bytes()) {
        for (int row = 0; row < num_rows; row++) {
            const size_t place = size_t(block) * size_t(num_rows) + size_t(row);
            const int32_t* x = tile.words + size_t(block) * words_per_block * size_t(num_rows) + row;
            for (int column = 0; column < kPanelRows; column++) {
                uint16_t half;
                std::memcpy(&half, panel + 2 * column, 2);
                const int sum = tile.offsets[place] + block_sum(panel + 2 * kPanelRows, column, shape, x, num_rows);
                const float scale = float_of_half(half) * tile.scales[place];
                y[row * kPanelRows + column] = __builtin_fmaf(float(sum), scale, y[row * kPanelRows + column]);
            }
        }
    }
}

constexpr edge::Kernels table = {
    "scalar",
    8,
    8,
    quantize,
    multiply,
    gelu_multiply<Vec1>,
    softcap<Vec1>,
    norm_add<Vec1>,
    norm_rotate<Vec1>,
    store_row<Vec1>,
    attend<Vec1, Vec1, 8>,
    scale_add<Vec1>,
    largest_of<Vec1>,
};

}  // namespace

const edge::Kernels* const edge::kScalar = &table;
