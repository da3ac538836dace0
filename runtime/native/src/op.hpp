// What an op needs to be one: attributes, tensors, parallel work, and its registration. Errors are thrown and become
// status values at the border to ONNX Runtime.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "ort_abi.hpp"

namespace edge {

struct OpError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool holds, const char* what) {
    if (!holds) throw OpError(what);
}

// The function table, set when the library is registered.
extern const void* const* ort_api;

template <class Function>
Function ort(OrtApiIndex index) {
    return reinterpret_cast<Function>(const_cast<void*>(ort_api[index]));
}

inline void check(OrtStatus* status) {
    if (!status) return;
    ort<void (*)(OrtStatus*)>(kReleaseStatus)(status);
    throw OpError("onnxruntime refused a call of its own interface");
}

class Attributes {
   public:
    explicit Attributes(const OrtKernelInfo* info) : info_(info) {}

    // An integer in [low, high].
    int integer(const char* name, int64_t low, int64_t high) const {
        int64_t value = 0;
        using Get = OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*);
        read(name, ort<Get>(kKernelInfoGetAttributeInt64)(info_, name, &value));
        if (value < low || value > high)
            throw OpError(std::string("attribute ") + name + " is " + std::to_string(value) + ", expected " +
                          std::to_string(low) + " to " + std::to_string(high));
        return int(value);
    }

    float number(const char* name) const {
        float value = 0;
        using Get = OrtStatus* (*)(const OrtKernelInfo*, const char*, float*);
        read(name, ort<Get>(kKernelInfoGetAttributeFloat)(info_, name, &value));
        return value;
    }

   private:
    static void read(const char* name, OrtStatus* status) {
        if (!status) return;
        ort<void (*)(OrtStatus*)>(kReleaseStatus)(status);
        throw OpError(std::string("attribute ") + name + " is missing or of another type");
    }
    const OrtKernelInfo* info_;
};

// A tensor's memory and shape. `data` is null where an optional input is absent.
struct Tensor {
    static constexpr size_t kMaxRank = 8;
    void* data = nullptr;
    size_t rank = 0;
    int64_t dims[kMaxRank] = {};

    int64_t last() const { return rank ? dims[rank - 1] : 1; }
    int64_t size() const {
        int64_t count = 1;
        for (size_t i = 0; i < rank; i++) count *= dims[i];
        return count;
    }
    int64_t num_rows() const { return last() ? size() / last() : 0; }
    const float* floats() const { return static_cast<const float*>(data); }
    const int64_t* integers() const { return static_cast<const int64_t*>(data); }
    const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
};

class Context {
   public:
    explicit Context(OrtKernelContext* context) : context_(context) {}

    size_t num_inputs() const {
        size_t count = 0;
        check(ort<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(kKernelContextGetInputCount)(context_, &count));
        return count;
    }

    Tensor input(size_t index) const {
        const OrtValue* value = nullptr;
        using Get = OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**);
        check(ort<Get>(kKernelContextGetInput)(context_, index, &value));
        Tensor tensor;
        if (!value) return tensor;
        tensor.data = memory(value);
        OrtTensorTypeAndShapeInfo* info = nullptr;
        check(ort<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(kGetTensorTypeAndShape)(value, &info));
        check(ort<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(kGetDimensionsCount)(info, &tensor.rank));
        const bool fits = tensor.rank <= Tensor::kMaxRank;
        if (fits)
            check(ort<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(kGetDimensions)(
                info, tensor.dims, tensor.rank));
        ort<void (*)(OrtTensorTypeAndShapeInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
        require(fits, "an input has more than 8 dimensions");
        return tensor;
    }

    // Memory of an output of this shape; null where the graph does not ask for it.
    void* output(size_t index, const int64_t* dims, size_t rank) const {
        OrtValue* value = nullptr;
        using Get = OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
        check(ort<Get>(kKernelContextGetOutput)(context_, index, dims, rank, &value));
        return value ? memory(value) : nullptr;
    }

    // Runs work() on every thread of the session's pool that is free, the caller's included; work() claims its share.
    template <class Work>
    void run_on_all_threads(Work& work) const {
        using Function = void (*)(void*, size_t);
        using ParallelFor = OrtStatus* (*)(const OrtKernelContext*, Function, size_t, size_t, void*);
        const Function call = [](void* data, size_t) { (*static_cast<Work*>(data))(); };
        check(ort<ParallelFor>(kKernelContextParallelFor)(context_, call, max_threads(), 0, &work));
    }

    // At least as many as the session's pool has: the pool does not say.
    static size_t max_threads() {
        static const size_t count = [] {
            const unsigned threads = std::thread::hardware_concurrency();
            return size_t(threads < 1 ? 1 : threads > 64 ? 64 : threads);
        }();
        return count;
    }

   private:
    static void* memory(const OrtValue* value) {
        void* data = nullptr;
        check(ort<OrtStatus* (*)(const OrtValue*, void**)>(kGetTensorMutableData)(value, &data));
        return data;
    }
    OrtKernelContext* context_;
};

// Hands out [0, count) in pieces that shrink towards the end: long streams first, no straggler last.
class Claims {
   public:
    explicit Claims(int count, int smallest = 1) : count_(count), smallest_(smallest) {}

    // The next piece; false where nothing is left.
    bool next(int& first, int& last) {
        int start = next_.load(std::memory_order_relaxed);
        do {
            if (start >= count_) return false;
            const int share = (count_ - start) / kShares;
            last = start + (share > smallest_ ? share : smallest_);
            if (last > count_) last = count_;
        } while (!next_.compare_exchange_weak(start, last, std::memory_order_relaxed));
        first = start;
        return true;
    }

   private:
    static constexpr int kShares = 4;
    std::atomic<int> next_{0};
    const int count_, smallest_;
};

// Tells the waiting that `count` pieces of a first phase are done. Waiting is safe: a claimed piece has a running owner.
class Phase {
   public:
    explicit Phase(int count) : count_(count) {}
    void done(int pieces) { done_.fetch_add(pieces, std::memory_order_release); }
    void wait() const {
        while (done_.load(std::memory_order_acquire) < count_) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#else
            std::this_thread::yield();
#endif
        }
    }

   private:
    std::atomic<int> done_{0};
    const int count_;
};

// Memory that grows and is used again, aligned to cache lines. Each thread has its own.
class Scratch {
   public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    void* get(size_t bytes) {
        if (bytes > capacity_) {
            std::free(memory_);
            capacity_ = 0;
            const size_t rounded = (bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, rounded);
            if (!memory_) throw std::bad_alloc();
            capacity_ = rounded;
        }
        return memory_;
    }

   private:
    void* memory_ = nullptr;
    size_t capacity_ = 0;
};

struct Parameter {
    int type;
    int characteristic = kOrtRequired;
};

// An op made of a class with kName, kInputs, kOutputs, a constructor from Attributes and compute(Context).
template <class Kernel>
struct Op : OrtCustomOp {
    Op() : OrtCustomOp{} {
        version = kOrtApiVersion;
        GetName = [](const OrtCustomOp*) { return Kernel::kName; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
        GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].type; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].characteristic; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
        GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
        GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].characteristic; };
        GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
        CreateKernelV2 = create;
        KernelComputeV2 = compute;
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }

   private:
    static OrtStatus* failure(const char* reason) {
        const std::string message = std::string(Kernel::kName) + ": " + reason;
        return ort<OrtStatus* (*)(int, const char*)>(kCreateStatus)(kOrtInvalidArgument, message.c_str());
    }

    static OrtStatus* create(const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
        try {
            *kernel = new Kernel(Attributes(info));
            return nullptr;
        } catch (const std::exception& error) {
            return failure(error.what());
        }
    }

    static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
        try {
            static_cast<Kernel*>(kernel)->compute(Context(context));
            return nullptr;
        } catch (const std::exception& error) {
            return failure(error.what());
        }
    }
};

}  // namespace edge
