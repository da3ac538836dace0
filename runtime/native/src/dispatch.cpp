// Which instruction set is used: the best that this processor runs, unless one is forced.
#include <atomic>
#include <cstring>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edge {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

#if defined(__x86_64__)
// One bit of what cpuid tells; registers 0 .. 3 are eax, ebx, ecx, edx. Not whether the operating system saves the
// vector registers: __builtin_cpu_supports looks at that too, but knows some features only in newer compilers.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int which, int bit) {
    unsigned registers[4] = {};
    unsigned last_subleaf = 0, unused;
    if (!__get_cpuid_count(leaf, 0, &last_subleaf, &unused, &unused, &unused)) return false;
    if (subleaf > 0 && last_subleaf < subleaf) return false;
    __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
    return registers[which] >> bit & 1;
}

bool runs(const Kernels* table) {
    __builtin_cpu_init();
    const bool f16c = cpuid_bit(1, 0, 2, 29);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (table == kAvx2) return avx2;
    if (table == kAvxVnni) return avx2 && cpuid_bit(7, 1, 0, 4);
    if (table == kAvx512Vnni || table == kAvx512Vnni256)
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
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool runs(const Kernels* table) {
    const bool dot_product = has("hw.optional.arm.FEAT_DotProd");
    if (table == kNeonDotprod) return dot_product;
    if (table == kNeonI8mm) return dot_product && has("hw.optional.arm.FEAT_I8MM");
    return table == kScalar;
}
#else
bool runs(const Kernels* table) { return table == kScalar; }
#endif

// The best first; what stands behind the scalar one must be forced.
constexpr int kNumTables = 7;

const Kernels* table_at(int i) {
    const Kernels* const tables[kNumTables] = {kAvx512Vnni,  kAvxVnni, kAvx2,         kNeonI8mm,
                                               kNeonDotprod, kScalar,  kAvx512Vnni256};
    return tables[i] && runs(tables[i]) ? tables[i] : nullptr;
}

const Kernels* best() {
    int i = 0;
    while (!table_at(i)) i++;  // the scalar one runs anywhere
    return table_at(i);
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
    for (int i = 0; const Kernels* table = runnable_kernels(i); i++) {
        if (std::strcmp(table->name, name) != 0) continue;
        chosen.store(table);
        return true;
    }
    return false;
}

const Kernels* runnable_kernels(int index) {
    for (int i = 0; i < kNumTables; i++)
        if (table_at(i) && index-- == 0) return table_at(i);
    return nullptr;
}

}  // namespace edge
