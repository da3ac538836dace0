// The code of kernels_avxvnni.cpp with the same instruction as AVX-512 encodes it: tests it where AVX-VNNI is missing.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
#include "products_vnni.hpp"

namespace {

struct Dot {
    static __m256i add(__m256i sums, __m256i weights, __m256i x) { return _mm256_dpbusd_epi32(sums, weights, x); }
};

constexpr edge::Kernels table = table_of<VnniProducts<Dot>>("avx512vl-vnni-256", 5);

}  // namespace
END_TARGET

const edge::Kernels* const edge::kAvx512Vnni256 = &table;
#else
const edge::Kernels* const edge::kAvx512Vnni256 = nullptr;
#endif
