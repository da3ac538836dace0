// Rotary and CachedAttention: attention over KV rows that lie in the runtime's own arrays.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

namespace edge {

// cos, sin [R, D / 2] of int64 positions [R] times frequencies [D / 2].
class Rotary {
   public:
    static constexpr const char* kName = "Rotary";
    static constexpr Parameter kInputs[] = {{kOrtInt64}, {kOrtFloat}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}, {kOrtFloat}};

    explicit Rotary(const Attributes&) {}
    void compute(const Context& context) const;
};

// Inputs: x [R, heads * D], norms [1 or 2, D], cos and sin [R, D / 2], rows int64 [3] = (start, stop, position of
// start), then keys and values of each KV head as bytes [capacity, bytes of a row], which tell their KvType. With 2
// norms x also holds the new keys and values, which are written in place at rows [stop - R, stop). Query r sees rows up
// to stop - R + r, in a window the last `window` of them.
class CachedAttention {
   public:
    static constexpr const char* kName = "CachedAttention";
    static constexpr Parameter kInputs[] = {{kOrtFloat}, {kOrtFloat}, {kOrtFloat},
                                            {kOrtFloat}, {kOrtInt64}, {kOrtUint8, kOrtVariadic}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}};

    explicit CachedAttention(const Attributes& attributes);
    void compute(const Context& context) const;

   private:
    class Call;
    int num_heads_, num_kv_heads_, window_;
    float epsilon_;
};

}  // namespace edge
