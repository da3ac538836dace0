// NEON with 8-bit matrix products (usmmla): Arm since Cortex-A510, A710, Neoverse V1 and Apple M2.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

// clang before 16 declares these instructions only where the whole build has them
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_MATMUL_INT8))
#include <arm_neon.h>

BEGIN_TARGET(NEON_I8MM)
#include "kernels_neon.hpp"

namespace {

struct Dot {
    static constexpr bool centered_8_bits = false;

    template <int LANE>
    static inline int32x4_t add(int32x4_t sums, uint8x16_t weights, int8x16_t x) {
        return vusdotq_laneq_s32(sums, weights, x, LANE);
    }
};

// 2 panel rows times 2 rows of x, 8 codes deep: a register holds two words of each of two rows.
struct MatrixProducts {
    static constexpr int groups(int num_rows) { return num_rows <= 2 ? 8 : num_rows <= 6 ? 4 : 2; }

    // Two words of rows 2 * pair and 2 * pair + 1; zeros where the second is missing.
    template <int ROWS>
    static inline int8x16_t load_x(const int32_t* words, int pair) {
        if (2 * pair + 1 < ROWS) return vreinterpretq_s8_s32(vld1q_s32(words + 4 * pair));
        return vreinterpretq_s8_s32(vcombine_s32(vld1_s32(words + 4 * pair), vdup_n_s32(0)));
    }

    // sums[group][pair][0] += panel rows 0 and 1 of the group . rows of x, [1]: panel rows 2 and 3
    template <int GROUPS, int PAIRS, int ROWS>
    static inline void add_words(int32x4_t (&sums)[GROUPS][PAIRS][2], int group, uint8x16_t first, uint8x16_t second,
                                 const int32_t* words) {
        const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
        const uint8x16_t rows_01 = vreinterpretq_u8_u32(vzip1q_u32(a, b));
        const uint8x16_t rows_23 = vreinterpretq_u8_u32(vzip2q_u32(a, b));
        UNROLL for (int pair = 0; pair < PAIRS; pair++) {
            const int8x16_t x = load_x<ROWS>(words, pair);
            sums[group][pair][0] = vusmmlaq_s32(sums[group][pair][0], rows_01, x);
            sums[group][pair][1] = vusmmlaq_s32(sums[group][pair][1], rows_23, x);
        }
    }

    template <int GROUPS, int PAIRS, int ROWS, int BITS>
    static inline void add_sub_block(int32x4_t (&sums)[GROUPS][PAIRS][2], const uint8_t* codes, const int32_t* words) {
        UNROLL for (int step = 0; step < kSubBlock / 8; step++) {
            UNROLL for (int group = 0; group < GROUPS; group++) {
                const uint8_t* place = codes + step * (BITS / 4) * kWordBytes + 16 * group;
                uint8x16_t first = vld1q_u8(place), second;
                if constexpr (BITS == 4) {
                    second = vshrq_n_u8(first, 4);
                    first = vandq_u8(first, vdupq_n_u8(15));
                } else {
                    second = vld1q_u8(place + kWordBytes);
                }
                add_words<GROUPS, PAIRS, ROWS>(sums, group, first, second, words + step * 2 * ROWS);
            }
        }
    }

    template <int GROUPS, int ROWS, int BITS>
    static inline void add_block(int32x4_t (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words,
                                 const int32_t* offsets, int block_size) {
        constexpr int kPairs = (ROWS + 1) / 2;
        int32x4_t products[GROUPS][kPairs][2];
        UNROLL for (int group = 0; group < GROUPS; group++)
            UNROLL for (int pair = 0; pair < kPairs; pair++)
                products[group][pair][0] = products[group][pair][1] = vdupq_n_s32(0);
        for (int k = 0; k < block_size; k += kSubBlock) {
            add_sub_block<GROUPS, kPairs, ROWS, BITS>(products, codes, words);
            codes += kSubBlock * BITS / 32 * kWordBytes;
            words += kSubBlock / 4 * ROWS;
        }
        UNROLL for (int group = 0; group < GROUPS; group++) {
            UNROLL for (int row = 0; row < ROWS; row++) {
                const int32x4_t rows_01 = products[group][row / 2][0], rows_23 = products[group][row / 2][1];
                const int32x4_t sum = row % 2 ? vuzp2q_s32(rows_01, rows_23) : vuzp1q_s32(rows_01, rows_23);
                sums[group][row] = vaddq_s32(sum, vdupq_n_s32(offsets[row]));
            }
        }
    }
};

constexpr edge::Kernels table = table_of<true, DotProducts<Dot>, MatrixProducts>("neon-i8mm");

}  // namespace
END_TARGET

const edge::Kernels* const edge::kNeonI8mm = &table;
#else
const edge::Kernels* const edge::kNeonI8mm = nullptr;
#endif
