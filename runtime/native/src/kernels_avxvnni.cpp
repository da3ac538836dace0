// AVX-VNNI: x86 without AVX-512 since Alder Lake and Sierra Forest.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avxvnni")
#include "products_vnni.hpp"

namespace {

struct Dot {
    static __m256i add(__m256i sums, __m256i weights, __m256i x) { return _mm256_dpbusd_avx_epi32(sums, weights, x); }
};

constexpr edge::Kernels table = table_of<VnniProducts<Dot>>("avxvnni", 5);

}  // namespace
END_TARGET

const edge::Kernels* const edge::kAvxVnni = &table;
#else
const edge::Kernels* const edge::kAvxVnni = nullptr;
#endif
