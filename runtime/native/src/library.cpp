// What the shared library offers: its ops to ONNX Runtime, and its choice of instruction set to Python.
#include <iterator>

#include "attention_op.hpp"
#include "kernels.hpp"
#include "matmul_op.hpp"
#include "row_ops.hpp"

#if defined(_WIN32)
#define EDGE_EXPORT extern "C" __declspec(dllexport)
#else
#define EDGE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace edge {

const void* const* ort_api = nullptr;

namespace {

template <class Kernel>
OrtStatus* add(OrtCustomOpDomain* domain) {
    static const Op<Kernel> op;  // must outlive every session
    using Add = OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*);
    return ort<Add>(kCustomOpDomainAdd)(domain, &op);
}

template <class... Kernels>
OrtStatus* add_all(OrtCustomOpDomain* domain) {
    OrtStatus* status = nullptr;
    (void)(((status = add<Kernels>(domain)) == nullptr) && ...);
    return status;
}

}  // namespace
}  // namespace edge

// Called by SessionOptions.register_custom_ops_library.
EDGE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace edge;
    const void* const* api = base->GetApi(kOrtApiVersion);
    if (!api) return nullptr;  // an older onnxruntime: it will find no such ops and say so
    ort_api = api;
    OrtCustomOpDomain* domain = nullptr;
    using Create = OrtStatus* (*)(const char*, OrtCustomOpDomain**);
    if (OrtStatus* status = ort<Create>(kCreateCustomOpDomain)("edge", &domain)) return status;
    if (OrtStatus* status =
            add_all<QuantizedMatMul, SelectedMatMul, NormAdd, Rotary, CachedAttention, TopLogits>(domain))
        return status;
    return ort<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(kAddCustomOpDomain)(options, domain);
}

// Name of the instruction set in use.
EDGE_EXPORT const char* edge_instruction_set() { return edge::kernels().name; }

// Forces one by name, null for the best; 0 where this build or processor has it not.
EDGE_EXPORT int edge_force_instruction_set(const char* name) { return edge::force_kernels(name); }
