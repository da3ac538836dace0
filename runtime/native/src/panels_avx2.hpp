// Quantizing, multiplying panels and attention with 256-bit registers, written once over how products are summed.
//
// P sums the products of one sub-block: P::add_4_bits and P::add_8_bits on sums[groups of 8 panel rows][rows of x],
// P::groups(rows) of such groups at once.
#pragma once
#include <immintrin.h>

#include "kernels.hpp"
#include "row_kernels.hpp"
#include "target.hpp"
#include "vec_avx2.hpp"

namespace {

using edge::kPanelRows;
using edge::MatrixShape;
using edge::QuantizedTile;

constexpr int kSubBlock = 32;  // weights of a row between two looks at the block's end

inline __m256i load_panel(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// GCC would move sums apart from their products, and with more of both alive than there are registers spill them.
inline void keep_in_register([[maybe_unused]] __m256i& a) {
#if !defined(__clang__)
    asm("" : "+x"(a));
#endif
}

// 8 values of a row from `k` on; zero behind the row's end.
inline __m256 load_values(const float* row, int k, int width) {
    if (k + 8 <= width) return _mm256_loadu_ps(row + k);
    return k < width ? load_part<Vec8>(row + k, width - k) : _mm256_setzero_ps();
}

inline int sum_of_lanes(__m256i a) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i quarter = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(quarter) + _mm_extract_epi32(quarter, 1);
}

inline float max_of_lanes(__m256 a) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

void quantize_block(const float* row, int block, const MatrixShape& shape, int32_t* words, int word_stride,
                    float* scale, int32_t* offset) {
    const int start = block * shape.block_size, stop = start + shape.block_size;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest_lanes = _mm256_setzero_ps(), poison_lanes = _mm256_setzero_ps();
    for (int k = start; k < stop; k += 8) {
        const __m256 values = load_values(row, k, shape.width);
        largest_lanes = _mm256_max_ps(largest_lanes, _mm256_andnot_ps(sign, values));
        poison_lanes = _mm256_fmadd_ps(values, _mm256_setzero_ps(), poison_lanes);
    }
    const float poison = Vec8::sum(poison_lanes);  // NaN where a value is NaN or infinite
    const float largest = poison == 0.0f ? max_of_lanes(largest_lanes) : 0.0f;
    const __m256 inverse = _mm256_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
    // 8 codes in the order in which the panels' words take them
    const __m128i even_and_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i sum = _mm256_setzero_si256();
    for (int k = start; k < stop; k += 8) {
        const __m256 values = poison == 0.0f ? load_values(row, k, shape.width) : _mm256_setzero_ps();
        const __m256i codes = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
        sum = _mm256_add_epi32(sum, codes);
        const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        __m128i bytes = _mm_packs_epi16(shorts, shorts);
        if (shape.bits == 4) bytes = _mm_shuffle_epi8(bytes, even_and_odd);
        int32_t* place = words + size_t((k - start) / 4) * size_t(word_stride);
        place[0] = _mm_cvtsi128_si32(bytes);
        place[word_stride] = _mm_extract_epi32(bytes, 1);
    }
    *scale = (largest > 1e-30f ? largest / 127.0f : 0.0f) + poison;
    *offset = -shape.middle() * sum_of_lanes(sum);
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

// Reads ahead by software only where computing delays the next loads: alone, the hardware's prefetcher is faster.
template <int GROUPS, int ROWS>
inline void read_ahead(const uint8_t* codes) {
    constexpr size_t kDistance = 4096;
    if (ROWS < 3) return;
    for (int line = 0; line < GROUPS * 32; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(codes) + kDistance + line, _MM_HINT_T0);
}

// y[row][8 * group ..] += one block's products, for GROUPS groups of 8 panel rows from `first_group` on.
template <class P, int GROUPS, int ROWS, int BITS>
inline void add_block(const uint8_t* block, const MatrixShape& shape, const int32_t* words, const float* x_scales,
                      const int32_t* offsets, int first_group, float* y) {
    const uint8_t* codes = block + 2 * kPanelRows + 32 * first_group;
    __m256i sums[GROUPS][ROWS];
    UNROLL for (int row = 0; row < ROWS; row++)
        UNROLL for (int group = 0; group < GROUPS; group++) sums[group][row] = _mm256_set1_epi32(offsets[row]);
    for (int k = 0; k < shape.block_size; k += kSubBlock) {
        if constexpr (BITS == 4) P::template add_4_bits<GROUPS, ROWS>(sums, codes, words);
        else P::template add_8_bits<GROUPS, ROWS>(sums, codes, words);
        codes += kSubBlock * BITS / 8 * kPanelRows;
        words += kSubBlock / 4 * ROWS;
    }
    UNROLL for (int group = 0; group < GROUPS; group++) {
        const auto* halves = reinterpret_cast<const __m128i*>(block) + first_group + group;
        const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(halves));
        UNROLL for (int row = 0; row < ROWS; row++) {
            float* place = y + row * kPanelRows + 8 * (first_group + group);
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[row]));
            const __m256 sum = _mm256_cvtepi32_ps(sums[group][row]);
            _mm256_storeu_ps(place, _mm256_fmadd_ps(sum, both, _mm256_loadu_ps(place)));
        }
    }
}

template <class P, int ROWS, int BITS>
void multiply_rows(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, float* y) {
    constexpr int kGroups = P::groups(ROWS);
    const int num_blocks = shape.num_blocks(), words_per_block = shape.block_size / 4;
    const size_t block_bytes = shape.block_bytes();
    const int32_t *words = tile.words, *offsets = tile.offsets;
    const float* x_scales = tile.scales;
    for (int i = 0; i < ROWS * kPanelRows; i += 8) _mm256_storeu_ps(y + i, _mm256_setzero_ps());
    for (int block = 0; block < num_blocks; block++) {
        read_ahead<2, ROWS>(panel);
        for (int group = 0; group < kPanelRows / 8; group += kGroups)
            add_block<P, kGroups, ROWS, BITS>(panel, shape, words, x_scales, offsets, group, y);
        panel += block_bytes;
        words += words_per_block * ROWS;
        x_scales += ROWS;
        offsets += ROWS;
    }
}

template <class P, int BITS>
void multiply_bits(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    switch (num_rows) {
        case 1: return multiply_rows<P, 1, BITS>(panel, shape, tile, y);
        case 2: return multiply_rows<P, 2, BITS>(panel, shape, tile, y);
        case 3: return multiply_rows<P, 3, BITS>(panel, shape, tile, y);
        case 4: return multiply_rows<P, 4, BITS>(panel, shape, tile, y);
        case 5: return multiply_rows<P, 5, BITS>(panel, shape, tile, y);
        case 6: return multiply_rows<P, 6, BITS>(panel, shape, tile, y);
        case 7: return multiply_rows<P, 7, BITS>(panel, shape, tile, y);
        default: return multiply_rows<P, 8, BITS>(panel, shape, tile, y);
    }
}

template <class P>
void multiply(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    if (shape.bits == 4) multiply_bits<P, 4>(panel, shape, tile, num_rows, y);
    else multiply_bits<P, 8>(panel, shape, tile, num_rows, y);
}

// The table of an instruction set that sums products as P does.
template <class P>
constexpr edge::Kernels table_of(const char* name, int num_tile_rows) {
    return {name,
            edge::kMaxTileRows,
            num_tile_rows,
            quantize,
            multiply<P>,
            gelu_multiply<Vec8>,
            softcap<Vec8>,
            norm_add<Vec8>,
            norm_rotate<Vec8>,
            store_row<Vec8>,
            attend<Vec8, Vec8, 8>,
            scale_add<Vec8>,
            largest_of<Vec8>};
}

}  // namespace
