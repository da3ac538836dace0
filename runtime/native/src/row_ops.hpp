// NormAdd and TopLogits: what is left between the products, a row at a time.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

namespace edge {

// total = scale * (residual + rms_norm(x) * weight); normed = rms_norm(total) * next_weight where that is given.
class NormAdd {
   public:
    static constexpr const char* kName = "NormAdd";
    static constexpr Parameter kInputs[] = {{kOrtFloat}, {kOrtFloat}, {kOrtFloat}, {kOrtFloat, kOrtOptional}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}, {kOrtFloat, kOrtOptional}};

    explicit NormAdd(const Attributes& attributes)
        : epsilon_(attributes.number("epsilon")),
          next_epsilon_(attributes.number("next_epsilon")),
          scale_(attributes.number("scale")) {}
    void compute(const Context& context) const;

   private:
    float epsilon_, next_epsilon_, scale_;
};

// The k largest logits of each row [R, V] and their int64 ids, by (value descending, id ascending). A row that holds a
// NaN gives NaN values.
class TopLogits {
   public:
    static constexpr const char* kName = "TopLogits";
    static constexpr Parameter kInputs[] = {{kOrtFloat}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}, {kOrtInt64}};

    explicit TopLogits(const Attributes& attributes) : k_(attributes.integer("k", 1, 1 << 20)) {}
    void compute(const Context& context) const;

   private:
    int k_;
};

}  // namespace edge
