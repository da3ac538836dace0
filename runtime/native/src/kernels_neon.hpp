// Quantizing and multiplying panels with NEON, written once over how products are summed.
//
// P sums the products of one block: P::add_block<groups of 4 panel rows, rows of x, bits>, P::groups(rows) of such
// groups at once. Here is the one for dot products; kernels_neon_i8mm.cpp has one for matrix products.
#pragma once
#include <arm_neon.h>

#include "kernels.hpp"
#include "row_kernels.hpp"
#include "target.hpp"
#include "vec_neon.hpp"

#if !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")  // scheduling before registers are allocated spills half of the sums
#endif

namespace {

using edge::kPanelRows;
using edge::MatrixShape;
using edge::QuantizedTile;

constexpr int kSubBlock = 32;  // weights of a row between two looks at the block's end
constexpr int kWordBytes = 4 * kPanelRows;

// 8 values of a row from `k` on; zero behind the row's end.
inline float32x4x2_t load_values(const float* row, int k, int width) {
    const auto part = [&](int start) { return load_part<Vec4>(row + start, width > start ? width - start : 0); };
    if (k + 8 <= width) return {{vld1q_f32(row + k), vld1q_f32(row + k + 4)}};
    return {{part(k), part(k + 4)}};
}

// Every two words of a row go to words[0] and words[second_word], the next two to words[2 * num_rows] and so on.
void quantize_block(const float* row, int block, const MatrixShape& shape, int32_t* words, size_t second_word,
                    size_t num_rows, float* scale, int32_t* offset) {
    const int start = block * shape.block_size, stop = start + shape.block_size;
    const float32x4_t zero = vdupq_n_f32(0.0f);
    float32x4_t largest_lanes = zero, poison_lanes = zero;
    for (int k = start; k < stop; k += 8) {
        const float32x4x2_t values = load_values(row, k, shape.width);
        largest_lanes = vmaxq_f32(largest_lanes, vmaxq_f32(vabsq_f32(values.val[0]), vabsq_f32(values.val[1])));
        poison_lanes = vfmaq_f32(vfmaq_f32(poison_lanes, values.val[0], zero), values.val[1], zero);
    }
    const float poison = vaddvq_f32(poison_lanes);  // NaN where a value is NaN or infinite
    const float largest = poison == 0.0f ? vmaxvq_f32(largest_lanes) : 0.0f;
    const float32x4_t inverse = vdupq_n_f32(largest > 1e-30f ? 127.0f / largest : 0.0f);
    int32x4_t sum = vdupq_n_s32(0);
    for (int k = start; k < stop; k += 8) {
        const float32x4x2_t values = poison == 0.0f ? load_values(row, k, shape.width) : float32x4x2_t{{zero, zero}};
        const int32x4_t a = vcvtnq_s32_f32(vmulq_f32(values.val[0], inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_f32(values.val[1], inverse));
        sum = vaddq_s32(sum, vaddq_s32(a, b));
        const int8x8_t codes = vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)));
        const int32x2_t even = vreinterpret_s32_s8(vuzp1_s8(codes, codes));
        const int32x2_t odd = vreinterpret_s32_s8(vuzp2_s8(codes, codes));
        const int32x2_t pair = shape.bits == 4 ? vzip1_s32(even, odd) : vreinterpret_s32_s8(codes);
        words[0] = vget_lane_s32(pair, 0);
        words[second_word] = vget_lane_s32(pair, 1);
        words += 2 * num_rows;
    }
    *scale = (largest > 1e-30f ? largest / 127.0f : 0.0f) + poison;
    *offset = -shape.middle() * vaddvq_s32(sum);
}

// PAIRED: words lie [padded_width / 8][num_rows][2], else [padded_width / 4][num_rows].
template <bool PAIRED>
void quantize(const float* x, size_t row_stride, int num_rows, const MatrixShape& shape, int first_block,
              int last_block, const QuantizedTile& tile) {
    const size_t rows = size_t(num_rows);
    for (size_t row = 0; row < rows; row++) {
        for (int block = first_block; block < last_block; block++) {
            const size_t place = size_t(block) * rows + row;
            const size_t first_word = size_t(block) * size_t(shape.block_size / 4) * rows + (PAIRED ? 2 * row : row);
            quantize_block(x + row * row_stride, block, shape, tile.words + first_word, PAIRED ? 1 : rows, rows,
                           tile.scales + place, tile.offsets + place);
        }
    }
}

// DOT::add<LANE>(sums, weights, x): sums[i] += 4 codes of weights . 4 codes in lane LANE of x; DOT::centered_8_bits
// where weights of 8 bits are to be signed, and then need no offset.
template <class DOT>
struct DotProducts {
    static constexpr int groups(int num_rows) { return num_rows <= 3 ? 8 : num_rows <= 6 ? 4 : 2; }

    static inline int32x4_t add(int32x4_t sums, uint8x16_t weights, const int32_t* words, int i) {
        const int8x16_t x = vreinterpretq_s8_s32(vld1q_s32(words + i / 4 * 4));
        switch (i % 4) {
            case 0: return DOT::template add<0>(sums, weights, x);
            case 1: return DOT::template add<1>(sums, weights, x);
            case 2: return DOT::template add<2>(sums, weights, x);
            default: return DOT::template add<3>(sums, weights, x);
        }
    }

    template <int GROUPS, int ROWS>
    static inline void add_4_bits(int32x4_t (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        UNROLL for (int word = 0; word < kSubBlock / 8; word++) {
            UNROLL for (int group = 0; group < GROUPS; group++) {
                const uint8x16_t both = vld1q_u8(codes + word * kWordBytes + 16 * group);
                const uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
                UNROLL for (int row = 0; row < ROWS; row++)
                    sums[group][row] = add(sums[group][row], low, words, 2 * word * ROWS + row);
                UNROLL for (int row = 0; row < ROWS; row++)
                    sums[group][row] = add(sums[group][row], high, words, (2 * word + 1) * ROWS + row);
            }
        }
    }

    template <int GROUPS, int ROWS>
    static inline void add_8_bits(int32x4_t (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        UNROLL for (int word = 0; word < kSubBlock / 4; word++) {
            UNROLL for (int group = 0; group < GROUPS; group++) {
                uint8x16_t weights = vld1q_u8(codes + word * kWordBytes + 16 * group);
                if (DOT::centered_8_bits) weights = veorq_u8(weights, vdupq_n_u8(128));
                UNROLL for (int row = 0; row < ROWS; row++)
                    sums[group][row] = add(sums[group][row], weights, words, word * ROWS + row);
            }
        }
    }

    template <int GROUPS, int ROWS, int BITS>
    static inline void add_block(int32x4_t (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words,
                                 const int32_t* offsets, int block_size) {
        const bool centered = BITS == 8 && DOT::centered_8_bits;
        UNROLL for (int row = 0; row < ROWS; row++) {
            const int32x4_t start = vdupq_n_s32(centered ? 0 : offsets[row]);
            UNROLL for (int group = 0; group < GROUPS; group++) sums[group][row] = start;
        }
        for (int k = 0; k < block_size; k += kSubBlock) {
            if constexpr (BITS == 4) add_4_bits(sums, codes, words);
            else add_8_bits(sums, codes, words);
            codes += kSubBlock * BITS / 32 * kWordBytes;
            words += kSubBlock / 4 * ROWS;
        }
    }
};

// y[row][4 * group ..] += one block's products, for GROUPS groups of 4 panel rows from `first_group` on.
template <class P, int GROUPS, int ROWS, int BITS>
inline void add_block(const uint8_t* block, const MatrixShape& shape, const int32_t* words, const float* x_scales,
                      const int32_t* offsets, int first_group, float* y) {
    int32x4_t sums[GROUPS][ROWS];
    P::template add_block<GROUPS, ROWS, BITS>(sums, block + 2 * kPanelRows + 16 * first_group, words, offsets,
                                              shape.block_size);
    UNROLL for (int group = 0; group < GROUPS; group++) {
        const float16x4_t halves = vreinterpret_f16_u8(vld1_u8(block + 8 * (first_group + group)));
        const float32x4_t scale = vcvt_f32_f16(halves);
        UNROLL for (int row = 0; row < ROWS; row++) {
            float* place = y + row * kPanelRows + 4 * (first_group + group);
            const float32x4_t both = vmulq_f32(scale, vdupq_n_f32(x_scales[row]));
            vst1q_f32(place, vfmaq_f32(vld1q_f32(place), vcvtq_f32_s32(sums[group][row]), both));
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
    for (int i = 0; i < ROWS * kPanelRows; i += 4) vst1q_f32(y + i, vdupq_n_f32(0.0f));
    for (int block = 0; block < num_blocks; block++) {
        for (int group = 0; group < kPanelRows / 4; group += kGroups)
            add_block<P, kGroups, ROWS, BITS>(panel, shape, words, x_scales, offsets, group, y);
        panel += block_bytes;
        words += words_per_block * ROWS;
        x_scales += ROWS;
        offsets += ROWS;
    }
}

// P1 for a single row, P for more.
template <class P1, class P, int BITS>
void multiply_bits(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    switch (num_rows) {
        case 1: return multiply_rows<P1, 1, BITS>(panel, shape, tile, y);
        case 2: return multiply_rows<P, 2, BITS>(panel, shape, tile, y);
        case 3: return multiply_rows<P, 3, BITS>(panel, shape, tile, y);
        case 4: return multiply_rows<P, 4, BITS>(panel, shape, tile, y);
        case 5: return multiply_rows<P, 5, BITS>(panel, shape, tile, y);
        case 6: return multiply_rows<P, 6, BITS>(panel, shape, tile, y);
        case 7: return multiply_rows<P, 7, BITS>(panel, shape, tile, y);
        default: return multiply_rows<P, 8, BITS>(panel, shape, tile, y);
    }
}

template <class P1, class P>
void multiply(const uint8_t* panel, const MatrixShape& shape, const QuantizedTile& tile, int num_rows, float* y) {
    if (shape.bits == 4) multiply_bits<P1, P, 4>(panel, shape, tile, num_rows, y);
    else multiply_bits<P1, P, 8>(panel, shape, tile, num_rows, y);
}

// The table of an instruction set that sums the products of one row as P1 does, those of several as P does.
template <bool PAIRED, class P1, class P>
constexpr edge::Kernels table_of(const char* name) {
    return {name,
            edge::kMaxTileRows,
            edge::kMaxTileRows,
            quantize<PAIRED>,
            multiply<P1, P>,
            gelu_multiply<Vec4>,
            softcap<Vec4>,
            norm_add<Vec4>,
            norm_rotate<Vec4>,
            store_row<Vec4>,
            attend<Vec4, Vec4, 16>,
            scale_add<Vec4>,
            largest_of<Vec4>};
}

}  // namespace
