// 4 lanes of NEON.
#pragma once
#include <arm_neon.h>

#include <cstring>

#include "target.hpp"

namespace {

struct Vec4 {
    using T = float32x4_t;
    static constexpr int lanes = 4;
    static T load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, T a) { vst1q_f32(p, a); }
    static T set(float a) { return vdupq_n_f32(a); }
    static T add(T a, T b) { return vaddq_f32(a, b); }
    static T sub(T a, T b) { return vsubq_f32(a, b); }
    static T mul(T a, T b) { return vmulq_f32(a, b); }
    static T div(T a, T b) { return vdivq_f32(a, b); }
    static T fma(T a, T b, T c) { return vfmaq_f32(c, a, b); }
    static T max(T a, T b) { return vmaxq_f32(a, b); }
    static T min(T a, T b) { return vminq_f32(a, b); }
    static T round(T a) { return vrndnq_f32(a); }
    static T power_of_two(T n) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
    }
    static T choose(T x, T low, T high, T value, T other) {
        return vbslq_f32(vandq_u32(vcleq_f32(low, x), vcleq_f32(x, high)), value, other);
    }
    static T load_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static void store_halves(uint16_t* p, T a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    static T set_half(uint16_t a) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a))); }
    static T load_codes(const int8_t* p) {
        int32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        const int8x8_t codes = vreinterpret_s8_s32(vdup_n_s32(bytes));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
    }
    static void store_codes(int8_t* p, T a) {
        const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a));
        const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
        std::memcpy(p, &bytes, sizeof bytes);
    }
    // Lane i is the sum of vector i of 4.
    static T fold(const T* a) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }
    static float sum(T a) { return vaddvq_f32(a); }
    static bool any_above(T a, T limit) { return vminvq_u32(vcleq_f32(a, limit)) == 0; }
};

}  // namespace
