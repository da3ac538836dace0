// Sums of products with vpdpbusd in 256-bit registers, over its two encodings (VEX: AVX-VNNI, EVEX: AVX-512).
#pragma once
#include "panels_avx2.hpp"

namespace {

// DOT::add(sums, weights, x): sums[i] += 4 unsigned codes of weights . 4 signed codes of x
template <class DOT>
struct VnniProducts {
    static constexpr int groups(int num_rows) { return num_rows <= 2 ? 4 : num_rows <= 6 ? 2 : 1; }

    template <int GROUPS, int ROWS>
    static inline void add_word(__m256i (&sums)[GROUPS][ROWS], const __m256i (&weights)[GROUPS], const int32_t* words) {
        UNROLL for (int row = 0; row < ROWS; row++) {
            const __m256i x = _mm256_set1_epi32(words[row]);
            UNROLL for (int group = 0; group < GROUPS; group++)
                sums[group][row] = DOT::add(sums[group][row], weights[group], x);
        }
    }

    template <int GROUPS, int ROWS>
    static inline void add_4_bits(__m256i (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        const __m256i low_nibbles = _mm256_set1_epi8(15);
        UNROLL for (int word = 0; word < kSubBlock / 8; word++) {
            __m256i low[GROUPS], high[GROUPS];
            read_ahead<GROUPS, ROWS>(codes + word * 128);
            UNROLL for (int group = 0; group < GROUPS; group++) {
                const __m256i both = load_panel(codes + word * 128 + 32 * group);
                low[group] = _mm256_and_si256(both, low_nibbles);
                high[group] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
            }
            add_word(sums, low, words + 2 * word * ROWS);
            add_word(sums, high, words + (2 * word + 1) * ROWS);
        }
    }

    template <int GROUPS, int ROWS>
    static inline void add_8_bits(__m256i (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        UNROLL for (int word = 0; word < kSubBlock / 4; word++) {
            __m256i weights[GROUPS];
            read_ahead<GROUPS, ROWS>(codes + word * 128);
            UNROLL for (int group = 0; group < GROUPS; group++)
                weights[group] = load_panel(codes + word * 128 + 32 * group);
            add_word(sums, weights, words + word * ROWS);
        }
    }
};

}  // namespace
