// 16 lanes of AVX-512.
#pragma once
#include <immintrin.h>

namespace {

struct Vec16 {
    using T = __m512;
    static constexpr int lanes = 16;
    static T load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, T a) { _mm512_storeu_ps(p, a); }
    static T set(float a) { return _mm512_set1_ps(a); }
    static T add(T a, T b) { return _mm512_add_ps(a, b); }
    static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
    static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
    static T div(T a, T b) { return _mm512_div_ps(a, b); }
    static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
    static T max(T a, T b) { return _mm512_max_ps(a, b); }
    static T min(T a, T b) { return _mm512_min_ps(a, b); }
    static T round(T a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static T power_of_two(T n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }
    static T choose(T x, T low, T high, T value, T other) {
        const __mmask16 inside = _mm512_cmp_ps_mask(low, x, _CMP_LE_OQ) & _mm512_cmp_ps_mask(x, high, _CMP_LE_OQ);
        return _mm512_mask_mov_ps(other, inside, value);
    }
    static T load_halves(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_halves(uint16_t* p, T a) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, kNearest));
    }
    static T set_half(uint16_t a) { return _mm512_cvtph_ps(_mm256_set1_epi16(int16_t(a))); }
    static T load_codes(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store_codes(int8_t* p, T a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
    }
    // Lane i is the sum of vector i of 16.
    static T fold(const T* a) {
        const T low = add_quarters(fold4(a), fold4(a + 4)), high = add_quarters(fold4(a + 8), fold4(a + 12));
        return add_quarters(low, high);
    }
    // Lane i of each 128-bit quarter is the sum of vector i's quarter.
    static T fold4(const T* a) {
        const __m512d x = _mm512_castps_pd(add_pairs(a[0], a[1])), y = _mm512_castps_pd(add_pairs(a[2], a[3]));
        return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    // Of each quarter: (a0 + a2, b0 + b2, a1 + a3, b1 + b3)
    static T add_pairs(T a, T b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
    // 128-bit quarters: (a0 + a1, a2 + a3, b0 + b1, b2 + b3)
    static T add_quarters(T a, T b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static float sum(T a) { return _mm512_reduce_add_ps(a); }
    static bool any_above(T a, T limit) { return _mm512_cmp_ps_mask(a, limit, _CMP_NLE_UQ) != 0; }
};

}  // namespace
