// float16 and float32, without instructions that a processor may lack.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
    if (exponent == 0) {  // zero and subnormal
        const float magnitude = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -magnitude : magnitude;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounded to the nearest, halfway cases to even; what is too large becomes infinite.
inline uint16_t half_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and above
    if (magnitude < 0x38800000u) {  // subnormal: units of 2^-24, which adding 0.5 moves to a float's lowest bits
        float units;
        std::memcpy(&units, &magnitude, sizeof units);
        units += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &units, sizeof rounded);
        return sign | uint16_t(rounded - 0x3f000000u);
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

}  // namespace
