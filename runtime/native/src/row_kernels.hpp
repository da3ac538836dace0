// Float arithmetic on rows, written once over a vector type; each instruction set includes it in its own file.
//
// V is a vector of V::lanes floats (vec_*.hpp). Fused multiply-adds are explicit and the files are compiled with
// contraction off, so that a value comes out the same wherever in a row or tile it lies.
#pragma once
#include <cmath>
#include <cstring>

#include "float16.hpp"
#include "kernels.hpp"
#include "target.hpp"

namespace {

using edge::AttentionSegment;
using edge::AttentionState;
using edge::kTileQueries;

// Up to V::lanes floats; the rest of the vector is zero.
template <class V>
inline typename V::T load_part(const float* p, int count) {
    if (count >= V::lanes) return V::load(p);
    float padded[V::lanes] = {};
    std::memcpy(padded, p, sizeof(float) * size_t(count));
    return V::load(padded);
}

template <class V>
inline void store_part(float* p, typename V::T a, int count) {
    if (count >= V::lanes) return V::store(p, a);
    float padded[V::lanes];
    V::store(padded, a);
    std::memcpy(p, padded, sizeof(float) * size_t(count));
}

// e^x for x <= 0; exactly 1 at 0, exactly 0 below -87, NaN for NaN. Source: Cephes expf.
template <class V>
inline typename V::T exp_negative(typename V::T x) {
    using T = typename V::T;
    const T clamped = V::max(x, V::set(-87.0f));
    const T n = V::round(V::mul(clamped, V::set(1.44269504088896341f)));
    T r = V::fma(n, V::set(-0.693359375f), clamped);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    T p = V::set(1.9875691500e-4f);
    p = V::fma(p, r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
    const T zero_or_nan = V::choose(x, V::set(-INFINITY), V::set(0.0f), V::set(0.0f), x);
    return V::choose(x, V::set(-87.0f), V::set(0.0f), V::mul(p, V::power_of_two(n)), zero_or_nan);
}

// tanh as a ratio of polynomials, relative error below 1e-6. Source: Eigen, generic_fast_tanh_float.
template <class V>
inline typename V::T tanh(typename V::T unclamped) {
    using T = typename V::T;
    const T x = V::min(V::max(unclamped, V::set(-7.90531110763549805f)), V::set(7.90531110763549805f));
    const T square = V::mul(x, x);
    T p = V::set(-2.76076847742355e-16f);
    p = V::fma(p, square, V::set(2.00018790482477e-13f));
    p = V::fma(p, square, V::set(-8.60467152213735e-11f));
    p = V::fma(p, square, V::set(5.12229709037114e-08f));
    p = V::fma(p, square, V::set(1.48572235717979e-05f));
    p = V::fma(p, square, V::set(6.37261928875436e-04f));
    p = V::fma(p, square, V::set(4.89352455891786e-03f));
    T q = V::set(1.19825839466702e-06f);
    q = V::fma(q, square, V::set(1.18534705686654e-04f));
    q = V::fma(q, square, V::set(2.26843463243900e-03f));
    q = V::fma(q, square, V::set(4.89352518554385e-03f));
    const T ratio = V::div(V::mul(x, p), q);
    // min and max drop a NaN: hand it on
    return V::choose(unclamped, V::set(-INFINITY), V::set(INFINITY), ratio, unclamped);
}

template <class V>
inline typename V::T gelu(typename V::T x) {
    using T = typename V::T;
    const T cube = V::mul(V::mul(x, x), x);
    const T inner = V::mul(V::set(0.7978845608028654f), V::fma(V::set(0.044715f), cube, x));
    return V::mul(V::mul(V::set(0.5f), x), V::add(V::set(1.0f), tanh<V>(inner)));
}

template <class V>
void gelu_multiply(const float* x, const float* other, float* y, int count) {
    for (int i = 0; i < count; i += V::lanes) {
        const int left = count - i;
        const auto product = V::mul(gelu<V>(load_part<V>(x + i, left)), load_part<V>(other + i, left));
        store_part<V>(y + i, product, left);
    }
}

template <class V>
void softcap(const float* x, float cap, float* y, int count) {
    for (int i = 0; i < count; i += V::lanes) {
        const int left = count - i;
        const auto ratio = V::div(load_part<V>(x + i, left), V::set(cap));
        store_part<V>(y + i, V::mul(V::set(cap), tanh<V>(ratio)), left);
    }
}

// 1 / sqrt(mean(x^2) + epsilon)
template <class V>
inline float inverse_rms(const float* x, int size, float epsilon) {
    typename V::T squares = V::set(0.0f);
    for (int i = 0; i < size; i += V::lanes) {
        const auto part = load_part<V>(x + i, size - i);
        squares = V::fma(part, part, squares);
    }
    return 1.0f / __builtin_sqrtf(V::sum(squares) / float(size) + epsilon);
}

template <class V>
void norm_add(const float* x, const float* weight, const float* residual, int size, float epsilon, float scale,
              float* total, const float* next_weight, float next_epsilon, float* normed) {
    const auto inverse = V::set(inverse_rms<V>(x, size, epsilon));
    for (int i = 0; i < size; i += V::lanes) {
        const int left = size - i;
        const auto unit = V::mul(load_part<V>(x + i, left), inverse);
        const auto sum = V::fma(unit, load_part<V>(weight + i, left), load_part<V>(residual + i, left));
        store_part<V>(total + i, V::mul(V::set(scale), sum), left);
    }
    if (!next_weight) return;
    const auto next_inverse = V::set(inverse_rms<V>(total, size, next_epsilon));
    for (int i = 0; i < size; i += V::lanes) {
        const int left = size - i;
        const auto unit = V::mul(load_part<V>(total + i, left), next_inverse);
        store_part<V>(normed + i, V::mul(unit, load_part<V>(next_weight + i, left)), left);
    }
}

template <class V>
void norm_rotate(const float* x, const float* weight, int size, float epsilon, const float* cos, const float* sin,
                 float* y) {
    const auto inverse = V::set(inverse_rms<V>(x, size, epsilon));
    for (int i = 0; i < size; i += V::lanes) {
        const int left = size - i;
        auto unit = V::mul(load_part<V>(x + i, left), inverse);
        if (weight) unit = V::mul(unit, load_part<V>(weight + i, left));
        store_part<V>(y + i, unit, left);
    }
    if (!cos) return;
    const int half = size / 2;
    for (int i = 0; i < half; i += V::lanes) {
        const int left = half - i;
        const auto a = load_part<V>(y + i, left), b = load_part<V>(y + half + i, left);
        const auto c = load_part<V>(cos + i, left), s = load_part<V>(sin + i, left);
        store_part<V>(y + i, V::sub(V::mul(a, c), V::mul(b, s)), left);
        store_part<V>(y + half + i, V::fma(b, c, V::mul(a, s)), left);
    }
}

// ---- rows of the KV cache
//
// A reader gives values of one row as floats, those of the block of kKvBlock dimensions that `dim` lies in.

template <class V>
struct FloatRow {
    static constexpr edge::KvType type = edge::KvType::float32;
    static constexpr int value_bytes = 4;
    FloatRow(const uint8_t* row, int, int) : values(reinterpret_cast<const float*>(row)) {}
    typename V::T load(int d) const { return V::load(values + d); }
    typename V::T load_part(int d, int count) const { return ::load_part<V>(values + d, count); }
    const float* values;
};

template <class V>
struct HalfRow {
    static constexpr edge::KvType type = edge::KvType::float16;
    static constexpr int value_bytes = 2;
    HalfRow(const uint8_t* row, int, int) : values(reinterpret_cast<const uint16_t*>(row)) {}
    typename V::T load(int d) const { return V::load_halves(values + d); }
    typename V::T load_part(int d, int count) const {
        if (count >= V::lanes) return load(d);
        uint16_t padded[V::lanes] = {};
        std::memcpy(padded, values + d, sizeof(uint16_t) * size_t(count));
        return V::load_halves(padded);
    }
    const uint16_t* values;
};

// The place of a block's scale behind a row's codes.
inline size_t scale_place(int head_dim, int dim) { return size_t(head_dim) + 2 * size_t(dim / edge::kKvBlock); }

template <class V>
struct CodeRow {
    static constexpr edge::KvType type = edge::KvType::int8;
    static constexpr int value_bytes = 1;
    CodeRow(const uint8_t* row, int head_dim, int dim) : codes(reinterpret_cast<const int8_t*>(row)) {
        uint16_t half;
        std::memcpy(&half, row + scale_place(head_dim, dim), sizeof half);
        scale = V::set_half(half);
    }
    typename V::T load(int d) const { return V::mul(V::load_codes(codes + d), scale); }
    typename V::T load_part(int d, int count) const {
        if (count >= V::lanes) return load(d);
        int8_t padded[V::lanes] = {};
        std::memcpy(padded, codes + d, size_t(count));
        return V::mul(V::load_codes(padded), scale);
    }
    const int8_t* codes;
    typename V::T scale;
};

// Up to V::lanes floats as halves, rounded to the nearest, halfway cases to even.
template <class V>
inline void store_halves(uint16_t* p, typename V::T a, int count) {
    if (count >= V::lanes) return V::store_halves(p, a);
    uint16_t padded[V::lanes];
    V::store_halves(padded, a);
    std::memcpy(p, padded, sizeof(uint16_t) * size_t(count));
}

// Up to V::lanes floats, at most 127 in size, as codes.
template <class V>
inline void store_codes(int8_t* p, typename V::T a, int count) {
    if (count >= V::lanes) return V::store_codes(p, a);
    int8_t padded[V::lanes];
    V::store_codes(padded, a);
    std::memcpy(p, padded, size_t(count));
}

// The largest absolute value, NaN where one is NaN or infinite.
template <class V>
float largest_magnitude(const float* x, int count) {
    auto largest = V::set(0.0f), poison = V::set(0.0f);
    for (int i = 0; i < count; i += V::lanes) {
        const auto part = load_part<V>(x + i, count - i);
        largest = V::max(largest, V::max(part, V::sub(V::set(0.0f), part)));
        poison = V::fma(part, V::set(0.0f), poison);
    }
    float lanes[V::lanes], result = 0.0f;
    V::store(lanes, largest);
    for (const float value : lanes) result = value > result ? value : result;
    return result + V::sum(poison);
}

// One block of int8: codes are those of the scale as it is stored. A scale below float16's numbers is 0.
template <class V>
void store_block(const float* x, int count, int8_t* codes, uint8_t* place) {
    const uint16_t half = half_of_float(largest_magnitude<V>(x, count) / 127.0f);
    const float scale = float_of_half(half);
    std::memcpy(place, &half, sizeof half);
    if (!(scale > 0.0f && scale < INFINITY)) {  // NaN times 0 is NaN, and so is infinity
        std::memset(codes, 0, size_t(count));
        return;
    }
    const auto inverse = V::set(1.0f / scale), most = V::set(127.0f), least = V::set(-127.0f);
    for (int i = 0; i < count; i += V::lanes) {
        const auto steps = V::mul(load_part<V>(x + i, count - i), inverse);
        store_codes<V>(codes + i, V::min(V::max(steps, least), most), count - i);
    }
}

template <class V>
void store_row(const float* x, int head_dim, edge::KvType type, uint8_t* row) {
    if (type == edge::KvType::float32) {
        std::memcpy(row, x, sizeof(float) * size_t(head_dim));
    } else if (type == edge::KvType::float16) {
        auto* halves = reinterpret_cast<uint16_t*>(row);
        for (int i = 0; i < head_dim; i += V::lanes)
            store_halves<V>(halves + i, load_part<V>(x + i, head_dim - i), head_dim - i);
    } else {
        for (int dim = 0; dim < head_dim; dim += edge::kKvBlock) {
            const int count = head_dim - dim < edge::kKvBlock ? head_dim - dim : edge::kKvBlock;
            store_block<V>(x + dim, count, reinterpret_cast<int8_t*>(row) + dim, row + scale_place(head_dim, dim));
        }
    }
}

// ---- attention

// Asks for one cache line of rows that are needed soon. Past the last row is harmless.
inline void read_ahead(const AttentionSegment& s, size_t row_bytes, int key, int num_keys, int offset) {
    constexpr int kKeysAhead = 8;
    for (int k = key; k < key + num_keys; k++) {
        __builtin_prefetch(s.keys + size_t(k + kKeysAhead) * row_bytes + offset, 0, 3);
        __builtin_prefetch(s.values + size_t(k) * row_bytes + offset, 0, 2);
    }
}

// scores[key][query] = query . key for KEYS keys from `key` on; the last key stands for those behind it.
template <class V, class Row, int QUERIES, int KEYS>
inline void score_keys(const AttentionSegment& s, int key, float* scores) {
    constexpr int kSums = KEYS * QUERIES, kLineDims = 64 / Row::value_bytes;
    static_assert(kSums % V::lanes == 0, "sums are folded a vector at a time");
    const size_t row_bytes = size_t(edge::kv_row_bytes(Row::type, s.head_dim));
    const uint8_t* places[KEYS];
    for (int k = 0; k < KEYS; k++) {
        const int row = key + k < s.num_keys ? key + k : s.num_keys - 1;
        places[k] = s.keys + size_t(row) * row_bytes;
    }
    typename V::T sums[kSums];
    UNROLL for (int i = 0; i < kSums; i++) sums[i] = V::set(0.0f);
    const auto add = [&](int d, const typename V::T (&parts)[KEYS]) {
        UNROLL for (int q = 0; q < QUERIES; q++) {
            const auto query = V::load(s.queries + size_t(q) * size_t(s.row_size) + d);
            UNROLL for (int k = 0; k < KEYS; k++)
                sums[k * QUERIES + q] = V::fma(parts[k], query, sums[k * QUERIES + q]);
        }
    };
    for (int block = 0; block < s.head_dim; block += edge::kKvBlock) {
        const int stop = block + edge::kKvBlock < s.head_dim ? block + edge::kKvBlock : s.head_dim;
        int d = block;
        for (; d + V::lanes <= stop; d += V::lanes) {
            if (s.reads_ahead && d % kLineDims == 0) read_ahead(s, row_bytes, key, KEYS, d * Row::value_bytes);
            typename V::T parts[KEYS];
            UNROLL for (int k = 0; k < KEYS; k++) parts[k] = Row(places[k], s.head_dim, block).load(d);
            add(d, parts);
        }
        if (d < stop) {
            typename V::T parts[KEYS];
            for (int k = 0; k < KEYS; k++) parts[k] = Row(places[k], s.head_dim, block).load_part(d, stop - d);
            add(d, parts);
        }
    }
    float totals[kSums];
    for (int i = 0; i < kSums; i += V::lanes) V::store(totals + i, V::fold(sums + i));
    for (int k = 0; k < KEYS; k++)
        std::memcpy(scores + size_t(key + k) * kTileQueries, totals + k * QUERIES, sizeof(float) * QUERIES);
}

// output[query][dim ...] = sum of weights[key][query] * value[key][dim ...], for VECTORS vectors of dimensions.
template <class V, class Row, int QUERIES, int VECTORS, bool WHOLE>
inline void add_values(const AttentionSegment& s, int dim, const float* weights, float* output) {
    static_assert(edge::kKvBlock % (VECTORS * V::lanes) == 0, "the dimensions at hand lie in one block");
    typename V::T sums[QUERIES][VECTORS];
    UNROLL for (int q = 0; q < QUERIES; q++)
        UNROLL for (int v = 0; v < VECTORS; v++) sums[q][v] = V::set(0.0f);
    const size_t row_bytes = size_t(edge::kv_row_bytes(Row::type, s.head_dim));
    for (int key = 0; key < s.num_keys; key++) {
        const Row row(s.values + size_t(key) * row_bytes, s.head_dim, dim);
        typename V::T parts[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++)
            parts[v] = WHOLE ? row.load(dim + v * V::lanes) : row.load_part(dim, s.head_dim - dim);
        UNROLL for (int q = 0; q < QUERIES; q++) {
            const auto weight = V::set(weights[key * kTileQueries + q]);
            UNROLL for (int v = 0; v < VECTORS; v++) sums[q][v] = V::fma(parts[v], weight, sums[q][v]);
        }
    }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++)
            V::store(output + size_t(q) * size_t(s.row_size) + size_t(dim + v * V::lanes), sums[q][v]);
}

// Scores become softmax numerators, relative to each query's largest. Lanes without a query hold anything.
template <class V>
void exponentiate(const AttentionSegment& s, float* scores, const AttentionState& result) {
    for (int lane = 0; lane < kTileQueries; lane += V::lanes) {
        auto largest = V::load(scores + lane);
        for (int key = 1; key < s.num_keys; key++)
            largest = V::max(largest, V::load(scores + key * kTileQueries + lane));
        auto sum = V::set(0.0f);
        for (int key = 0; key < s.num_keys; key++) {
            float* place = scores + key * kTileQueries + lane;
            const auto weight = exp_negative<V>(V::sub(V::load(place), largest));
            V::store(place, weight);
            sum = V::add(sum, weight);
        }
        V::store(result.largest + lane, largest);
        V::store(result.sum + lane, sum);
    }
}

// SUMS sums stay in registers, enough that they hide each other's latency. None of the sizes changes a result.
template <class V, class Lanes, class Row, int QUERIES, int SUMS>
void attend_queries(const AttentionSegment& s, float* scores, const AttentionState& result) {
    constexpr int kKeys = SUMS / QUERIES, kVectors = SUMS / QUERIES;
    for (int key = 0; key < s.num_keys; key += kKeys) score_keys<V, Row, QUERIES, kKeys>(s, key, scores);
    exponentiate<Lanes>(s, scores, result);
    int dim = 0;
    for (; dim + kVectors * V::lanes <= s.head_dim; dim += kVectors * V::lanes)
        add_values<V, Row, QUERIES, kVectors, true>(s, dim, scores, result.output);
    for (; dim < s.head_dim; dim += V::lanes) add_values<V, Row, QUERIES, 1, false>(s, dim, scores, result.output);
}

template <class V, class Lanes, class Row, int SUMS>
void attend_rows(const AttentionSegment& segment, float* scores, const AttentionState& result) {
    constexpr int kSmall = edge::kSmallTileQueries;
    if (segment.num_queries <= kSmall) attend_queries<V, Lanes, Row, kSmall, SUMS>(segment, scores, result);
    else attend_queries<V, Lanes, Row, kTileQueries, SUMS>(segment, scores, result);
}

// V holds dimensions, Lanes queries.
template <class V, class Lanes, int SUMS>
void attend(const AttentionSegment& segment, float* scores, const AttentionState& result) {
    switch (segment.type) {
        case edge::KvType::float32: return attend_rows<V, Lanes, FloatRow<V>, SUMS>(segment, scores, result);
        case edge::KvType::float16: return attend_rows<V, Lanes, HalfRow<V>, SUMS>(segment, scores, result);
        case edge::KvType::int8: return attend_rows<V, Lanes, CodeRow<V>, SUMS>(segment, scores, result);
    }
}

// y = keep * y + take * x
template <class V>
void scale_add(const float* x, float keep, float take, float* y, int count) {
    const auto keeps = V::set(keep), takes = V::set(take);
    for (int i = 0; i < count; i += V::lanes) {
        const int left = count - i;
        const auto kept = V::mul(load_part<V>(y + i, left), keeps);
        store_part<V>(y + i, V::fma(load_part<V>(x + i, left), takes, kept), left);
    }
}

template <class V>
float largest_of(const float* x, int count) {
    auto best = V::set(-INFINITY);
    int i = 0;
    for (; i + V::lanes <= count; i += V::lanes) {
        const auto part = V::load(x + i);
        if (V::any_above(part, V::set(INFINITY))) return NAN;  // nothing else is above
        best = V::max(best, part);
    }
    float lanes[V::lanes], result = -INFINITY;
    V::store(lanes, best);
    for (const float value : lanes) result = value > result ? value : result;
    for (; i < count; i++) {
        if (__builtin_isnan(x[i])) return NAN;
        result = x[i] > result ? x[i] : result;
    }
    return result;
}

}  // namespace
