// NEON with dot products (sdot): Arm since Cortex-A75, A55 and Apple A11.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

// clang before 16 declares these instructions only where the whole build has them
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#include <arm_neon.h>

BEGIN_TARGET(NEON_DOTPROD)
#include "kernels_neon.hpp"

namespace {

struct Dot {
    static constexpr bool centered_8_bits = true;

    template <int LANE>
    static inline int32x4_t add(int32x4_t sums, uint8x16_t weights, int8x16_t x) {
        return vdotq_laneq_s32(sums, vreinterpretq_s8_u8(weights), x, LANE);
    }
};

constexpr edge::Kernels table = table_of<false, DotProducts<Dot>, DotProducts<Dot>>("neon-dotprod");

}  // namespace
END_TARGET

const edge::Kernels* const edge::kNeonDotprod = &table;
#else
const edge::Kernels* const edge::kNeonDotprod = nullptr;
#endif
