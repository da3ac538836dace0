// QuantizedMatMul and SelectedMatMul: activations times a matrix of 4 or 8 bits that stays where it is mapped.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

namespace edge {

// y = epilogue(x @ W.T), x [..., K], W as matrix.hpp draws it.
class QuantizedMatMul {
   public:
    static constexpr const char* kName = "QuantizedMatMul";
    static constexpr Parameter kInputs[] = {{kOrtFloat}, {kOrtUint8}, {kOrtFloat, kOrtOptional}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}};
    enum Epilogue { kPlain = 0, kGeluGlu = 1, kGeluMultiply = 2, kSoftcap = 3 };

    explicit QuantizedMatMul(const Attributes& attributes);
    void compute(const Context& context) const;

   private:
    MatrixShape shape_;
    Epilogue epilogue_;
    float softcap_;
};

// y [S * group_size] = one row of x times the groups of W's rows that `groups` int64 [S] names.
class SelectedMatMul {
   public:
    static constexpr const char* kName = "SelectedMatMul";
    static constexpr Parameter kInputs[] = {{kOrtFloat}, {kOrtUint8}, {kOrtInt64}};
    static constexpr Parameter kOutputs[] = {{kOrtFloat}};

    explicit SelectedMatMul(const Attributes& attributes);
    void compute(const Context& context) const;

   private:
    MatrixShape shape_;
    int group_size_;
};

}  // namespace edge
