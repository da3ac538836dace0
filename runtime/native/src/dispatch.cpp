// Which instruction set is used: the best that this processor runs, unless one is forced.
#include <atomic>
#include <cstring>

#include "kernels.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edge {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

#if defined(__x86_64__)
bool runs(const Kernels* table) {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (table == kAvx2) return avx2;
    if (table == kAvxVnni) return avx2;
    if (table == kAvx512Vnni)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    return table == kScalar;
}
#elif defined(__aarch64__) && defined(__linux__)
bool runs(const Kernels* table) {
    constexpr unsigned long kDotProduct = 1ul << 20, kInt8MatrixMultiply = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
    if (table == kNeonDotprod) return getauxval(AT_HWCAP) & kDotProduct;
    if (table == kNeonI8mm) return (getauxval(AT_HWCAP) & kDotProduct) && (getauxval(AT_HWCAP2) & kInt8MatrixMultiply);
    return table == kScalar;
}
#else
bool runs(const Kernels* table) { return table == kScalar; }
#endif

const Kernels* best() {
    for (const Kernels* table : {kAvx512Vnni, kAvxVnni, kAvx2, kNeonI8mm, kNeonDotprod})
        if (table && runs(table)) return table;
    return kScalar;
}

}  // namespace

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_acquire);
    if (!table) chosen.store(table = best(), std::memory_order_release);
    return *table;
}

bool force_kernels(const char* name) {
    if (!name) {
        chosen.store(best());
        return true;
    }
    for (const Kernels* table : {kAvx512Vnni, kAvxVnni, kAvx2, kNeonI8mm, kNeonDotprod, kScalar}) {
        if (!table || std::strcmp(table->name, name) != 0) continue;
        if (!runs(table)) return false;
        chosen.store(table);
        return true;
    }
    return false;
}

}  // namespace edge
