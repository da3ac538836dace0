// AVX2 with FMA: x86 since Haswell and Zen.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c")
#include "panels_avx2.hpp"

namespace {

// vpmaddubsw: pairs of products, unsigned times signed, summed to int16 with saturation - so that it must never occur.
struct MaddubsProducts {
    static constexpr int groups(int num_rows) { return num_rows <= 2 ? 4 : num_rows <= 6 ? 2 : 1; }

    template <int GROUPS, int ROWS>
    static inline void add_pairs(__m256i (&sums)[GROUPS][ROWS], const __m256i (&pairs)[GROUPS][ROWS]) {
        const __m256i ones = _mm256_set1_epi16(1);
        UNROLL for (int group = 0; group < GROUPS; group++)
            UNROLL for (int row = 0; row < ROWS; row++)
                sums[group][row] = _mm256_add_epi32(sums[group][row], _mm256_madd_epi16(pairs[group][row], ones));
    }

    template <int GROUPS, int ROWS>
    static inline void add_word(__m256i (&pairs)[GROUPS][ROWS], const __m256i (&weights)[GROUPS], const int32_t* words,
                                bool first) {
        UNROLL for (int row = 0; row < ROWS; row++) {
            const __m256i x = _mm256_set1_epi32(words[row]);
            UNROLL for (int group = 0; group < GROUPS; group++) {
                const __m256i products = _mm256_maddubs_epi16(weights[group], x);
                pairs[group][row] = first ? products : _mm256_add_epi16(pairs[group][row], products);
                keep_in_register(pairs[group][row]);
            }
        }
    }

    // A sub-block sums 8 pairs of products in int16: at most 16 * 15 * 127 = 30480.
    template <int GROUPS, int ROWS>
    static inline void add_4_bits(__m256i (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        static_assert(kSubBlock / 2 * 15 * 127 <= 32767, "int16 sums overflow");
        const __m256i low_nibbles = _mm256_set1_epi8(15);
        __m256i pairs[GROUPS][ROWS];
        UNROLL for (int word = 0; word < kSubBlock / 8; word++) {
            __m256i low[GROUPS], high[GROUPS];
            read_ahead<GROUPS, ROWS>(codes + word * 128);
            UNROLL for (int group = 0; group < GROUPS; group++) {
                const __m256i both = load_panel(codes + word * 128 + 32 * group);
                low[group] = _mm256_and_si256(both, low_nibbles);
                high[group] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
            }
            add_word(pairs, low, words + 2 * word * ROWS, word == 0);
            add_word(pairs, high, words + (2 * word + 1) * ROWS, false);
        }
        add_pairs(sums, pairs);
    }

    // A code of 8 bits is two nibbles that meet the same x: their sums of pairs weigh 1 and 16.
    template <int GROUPS, int ROWS>
    static inline void add_8_bits(__m256i (&sums)[GROUPS][ROWS], const uint8_t* codes, const int32_t* words) {
        const __m256i low_nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
        UNROLL for (int group = 0; group < GROUPS; group++) {
            __m256i pairs[2][ROWS];
            UNROLL for (int word = 0; word < kSubBlock / 4; word++) {
                if (group == 0) read_ahead<GROUPS, ROWS>(codes + word * 128);
                const __m256i both = load_panel(codes + word * 128 + 32 * group);
                const __m256i nibbles[2] = {_mm256_and_si256(both, low_nibbles),
                                            _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles)};
                add_word(pairs, nibbles, words + word * ROWS, word == 0);
            }
            UNROLL for (int row = 0; row < ROWS; row++) {
                const __m256i low = _mm256_madd_epi16(pairs[0][row], ones);
                const __m256i high = _mm256_madd_epi16(pairs[1][row], sixteens);
                sums[group][row] = _mm256_add_epi32(sums[group][row], _mm256_add_epi32(low, high));
            }
        }
    }
};

constexpr edge::Kernels table = table_of<MaddubsProducts>("avx2", 4);

}  // namespace
END_TARGET

const edge::Kernels* const edge::kAvx2 = &table;
#else
const edge::Kernels* const edge::kAvx2 = nullptr;
#endif
