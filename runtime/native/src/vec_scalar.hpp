// One lane: the plain reference, on any processor.
#pragma once
#include <cmath>

#include "float16.hpp"

namespace {

struct Vec1 {
    using T = float;
    static constexpr int lanes = 1;
    static T load(const float* p) { return *p; }
    static void store(float* p, T a) { *p = a; }
    static T set(float a) { return a; }
    static T add(T a, T b) { return a + b; }
    static T sub(T a, T b) { return a - b; }
    static T mul(T a, T b) { return a * b; }
    static T div(T a, T b) { return a / b; }
    static T fma(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
    static T max(T a, T b) { return a > b ? a : b; }
    static T min(T a, T b) { return a < b ? a : b; }
    static T round(T a) { return __builtin_nearbyintf(a); }
    static T power_of_two(T n) { return __builtin_ldexpf(1.0f, int(n)); }
    // value where low <= x <= high, else other
    static T choose(T x, T low, T high, T value, T other) { return low <= x && x <= high ? value : other; }
    static T load_halves(const uint16_t* p) { return float_of_half(*p); }
    static void store_halves(uint16_t* p, T a) { *p = half_of_float(a); }
    static T set_half(uint16_t a) { return float_of_half(a); }
    static T load_codes(const int8_t* p) { return float(*p); }
    static void store_codes(int8_t* p, T a) { *p = int8_t(round(a)); }
    static T fold(const T* a) { return *a; }
    static float sum(T a) { return a; }
    static bool any_above(T a, T limit) { return !(a <= limit); }
};

}  // namespace
