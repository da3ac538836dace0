// AVX-512 with VNNI: server and desktop x86 since Ice Lake and Zen 4.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "row_kernels.hpp"
#include "vec_avx2.hpp"
#include "vec_avx512.hpp"

namespace {

using edge::kPanelRows;
using edge::MatrixShape;
using edge::QuantizedTile;

constexpr int kSubBlock = 32;  // weights of a row between two looks at the block's end

// 16 values of a row from `k` on; zero behind the row's end.
inline __m512 load_values(const float* row, int k, int width) {
    if (k + 16 <= width) return _mm512_loadu_ps(row + k);
    const int left = width > k ? width - k : 0;
    return _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1u), row + k);
}

// 16 codes in the order in which the panels' words take them.
inline __m128i order_codes(__m128i codes, int bits) {
    const __m128i even_and_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return bits == 8 ? codes : _mm_shuffle_epi8(codes, even_and_odd);
}

void quantize_block(const float* row, int block, const MatrixShape& shape, int32_t* words, int word_stride,
                    float* scale, int32_t* offset) {
    const int start = block * shape.block_size, stop = start + shape.block_size;
    __m512 largest_lanes = _mm512_setzero_ps(), poison_lanes = _mm512_setzero_ps();
    for (int k = start; k < stop; k += 16) {
        const __m512 values = load_values(row, k, shape.width);
        largest_lanes = _mm512_max_ps(largest_lanes, _mm512_abs_ps(values));
        poison_lanes = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison_lanes);
    }
    const float poison = _mm512_reduce_add_ps(poison_lanes);  // NaN where a value is NaN or infinite
    const float largest = poison == 0.0f ? _mm512_reduce_max_ps(largest_lanes) : 0.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int k = start; k < stop; k += 16) {
        const __m512 values = poison == 0.0f ? load_values(row, k, shape.width) : _mm512_setzero_ps();
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
        sum = _mm512_add_epi32(sum, codes);
        const __m128i bytes = order_codes(_mm512_cvtsepi32_epi8(codes), shape.bits);
        int32_t* place = words + (k - start) / 4 * word_stride;
        place[0] = _mm_extract_epi32(bytes, 0);
        place[word_stride] = _mm_extract_epi32(bytes, 1);
        place[2 * word_stride] = _mm_extract_epi32(bytes, 2);
        place[3 * word_stride] = _mm_extract_epi32(bytes, 3);
    }
    *scale = (largest > 1e-30f ? largest / 127.0f : 0.0f) + poison;
    *offset = -shape.middle() * _mm512_reduce_add_epi32(sum);
}

void quantize(const float* x, size_t row_stride, int num_rows, const MatrixShape& shape, int first_block,
              int last_block, const QuantizedTile& tile) {
    for (int row = 0; row < num_rows; row++) {
        for (int block = first_block; block < last_block; block++) {
            const size_t place = size_t(block) * size_t(num_rows) + size_t(row);
            int32_t* words = tile.words + size_t(block) * size_t(shape.block_size / 4) * size_t(num_rows) + row;
            quantize_block(x + size_t(row) * row_stride, block, shape, words, num_rows, tile.scales + place,
                           tile.offsets + place);
        }
    }
}

// sums[half][row] += codes of 16 panel rows each . one word of every row of x
template <int ROWS>
inline void add_products(__m512i (&sums)[2][ROWS], __m512i weights0, __m512i weights1, const int32_t* words) {
    UNROLL for (int row = 0; row < ROWS; row++) {
        const __m512i x = _mm512_set1_epi32(words[row]);
        sums[0][row] = _mm512_dpbusd_epi32(sums[0][row], weights0, x);
        sums[1][row] = _mm512_dpbusd_epi32(sums[1][row], weights1, x);
    }
}

template <int ROWS>
inline void add_sub_block_of_4_bits(__m512i (&sums)[2][ROWS], const uint8_t* panel, const int32_t* words) {
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    UNROLL for (int word = 0; word < kSubBlock / 8; word++) {
        __m512i weights0 = _mm512_load_si512(panel + word * 128), weights1 = _mm512_load_si512(panel + word * 128 + 64);
#if !defined(__clang__)
        asm("" : "+v"(weights0), "+v"(weights1));  // keeps each a single load, not one for either nibble
#endif
        add_products(sums, _mm512_and_si512(weights0, low_nibbles), _mm512_and_si512(weights1, low_nibbles),
                     words + 2 * word * ROWS);
        add_products(sums, _mm512_and_si512(_mm512_srli_epi16(weights0, 4), low_nibbles),
                     _mm512_and_si512(_mm512_srli_epi16(weights1, 4), low_nibbles), words + (2 * word + 1) * ROWS);
    }
}

// 64 bytes of a panel. For one row of 8 bits, where nothing is to be done but to load, in halves: measured on Zen 4,
// memory then gives a quarter more.
template <int ROWS>
inline __m512i load_line(const uint8_t* line) {
    if (ROWS > 1) return _mm512_load_si512(line);
    const auto* halves = reinterpret_cast<const __m256i*>(line);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256(halves)), _mm256_load_si256(halves + 1), 1);
}

template <int ROWS>
inline void add_sub_block_of_8_bits(__m512i (&sums)[2][ROWS], const uint8_t* panel, const int32_t* words) {
    UNROLL for (int word = 0; word < kSubBlock / 4; word++)
        add_products(sums, load_line<ROWS>(panel + word * 128), load_line<ROWS>(panel + word * 128 + 64),
                     words + word * ROWS);
}

// Reads ahead by software only where computing delays the next loads: alone, the hardware's prefetcher is faster.
template <int ROWS>
inline void read_ahead(const uint8_t* panel, size_t bytes) {
    constexpr size_t kDistance = 4096;
    if (ROWS < 3) return;
    for (size_t line = 0; line < bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(panel) + line + kDistance, _MM_HINT_T0);
}

template <int ROWS, int BITS>
void multiply_rows(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, float* y) {
    constexpr size_t kSubBlockBytes = size_t(kSubBlock) * BITS / 8 * kPanelRows;
    const int num_blocks = shape.num_blocks(), num_sub_blocks = shape.block_size / kSubBlock;
    const int32_t *words = tile.words, *offsets = tile.offsets;
    const float* x_scales = tile.scales;
    __m512 totals[2][ROWS];
    UNROLL for (int row = 0; row < ROWS; row++) totals[0][row] = totals[1][row] = _mm512_setzero_ps();
    for (int block = 0; block < num_blocks; block++) {
        const auto* scales = reinterpret_cast<const __m256i*>(panel);
        read_ahead<ROWS>(panel, 64);
        panel += 2 * kPanelRows;
        __m512i sums[2][ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) sums[0][row] = sums[1][row] = _mm512_set1_epi32(offsets[row]);
        for (int sub_block = 0; sub_block < num_sub_blocks; sub_block++) {
            read_ahead<ROWS>(panel, kSubBlockBytes);
            if constexpr (BITS == 4) add_sub_block_of_4_bits(sums, panel, words);
            else add_sub_block_of_8_bits(sums, panel, words);
            panel += kSubBlockBytes;
            words += kSubBlock / 4 * ROWS;
        }
        UNROLL for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256(scales + half));
            UNROLL for (int row = 0; row < ROWS; row++) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[row]));
                totals[half][row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[half][row]), both, totals[half][row]);
            }
        }
        x_scales += ROWS;
        offsets += ROWS;
    }
    UNROLL for (int row = 0; row < ROWS; row++) {
        _mm512_storeu_ps(y + row * kPanelRows, totals[0][row]);
        _mm512_storeu_ps(y + row * kPanelRows + 16, totals[1][row]);
    }
}

template <int BITS>
void multiply_bits(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    switch (num_rows) {
        case 1: return multiply_rows<1, BITS>(panel, shape, tile, y);
        case 2: return multiply_rows<2, BITS>(panel, shape, tile, y);
        case 3: return multiply_rows<3, BITS>(panel, shape, tile, y);
        case 4: return multiply_rows<4, BITS>(panel, shape, tile, y);
        case 5: return multiply_rows<5, BITS>(panel, shape, tile, y);
        case 6: return multiply_rows<6, BITS>(panel, shape, tile, y);
        case 7: return multiply_rows<7, BITS>(panel, shape, tile, y);
        default: return multiply_rows<8, BITS>(panel, shape, tile, y);
    }
}

void multiply(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    if (shape.bits == 4) multiply_bits<4>(panel, shape, tile, num_rows, y);
    else multiply_bits<8>(panel, shape, tile, num_rows, y);
}

constexpr edge::Kernels table = {
    "avx512vnni",
    8,
    6,  // 24 of 32 registers hold sums; 8 rows at once would spill
    quantize,
    multiply,
    gelu_multiply<Vec16>,
    softcap<Vec16>,
    norm_add<Vec16>,
    norm_rotate<Vec16>,
    store_row<Vec16>,
    attend<Vec16, Vec8, 16>,
    scale_add<Vec16>,
    largest_of<Vec16>,
};

}  // namespace
END_TARGET

const edge::Kernels* const edge::kAvx512Vnni = &table;
#else
const edge::Kernels* const edge::kAvx512Vnni = nullptr;
#endif
