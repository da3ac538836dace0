// Float arithmetic on rows, written once over a vector type; each instruction set includes it in its own file.
//
// V is a vector of V::lanes floats (vec_*.hpp). Fused multiply-adds are explicit and the files are compiled with
// contraction off, so that a value comes out the same wherever in a row or tile it lies.
#pragma once
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "target.hpp"

namespace {

using edge::AttentionSegment;
using edge::AttentionState;
using edge::kMaxQueryRows;

// Two registers as one vector: then one element of a key serves two registers of queries.
template <class V>
struct Pair {
    struct T {
        typename V::T a, b;
    };
    static constexpr int lanes = 2 * V::lanes;
    static T load(const float* p) { return {V::load(p), V::load(p + V::lanes)}; }
    static void store(float* p, T x) { V::store(p, x.a), V::store(p + V::lanes, x.b); }
    static T set(float x) { return {V::set(x), V::set(x)}; }
    static T add(T x, T y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
    static T sub(T x, T y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
    static T mul(T x, T y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
    static T fma(T x, T y, T z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
    static T max(T x, T y) { return {V::max(x.a, y.a), V::max(x.b, y.b)}; }
    static T round(T x) { return {V::round(x.a), V::round(x.b)}; }
    static T power_of_two(T n) { return {V::power_of_two(n.a), V::power_of_two(n.b)}; }
    static T choose(T x, T low, T high, T value, T other) {
        return {V::choose(x.a, low.a, high.a, value.a, other.a), V::choose(x.b, low.b, high.b, value.b, other.b)};
    }
};

constexpr float kEmptyScore = -1e30f;  // below any score; finite, so that differences of two are numbers

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

// scores[key][lane] = query . key, for KEYS keys at a time so that each query vector is loaded once for all of them.
template <class V, int KEYS>
inline void score_keys(const AttentionSegment& s, int key, int lane, float* scores) {
    const float* rows = s.keys + size_t(key) * size_t(s.head_dim);
    typename V::T sums[KEYS];
    for (int k = 0; k < KEYS; k++) sums[k] = V::set(0.0f);
    for (int d = 0; d < s.head_dim; d++) {
        const auto query = V::load(s.queries + size_t(d) * size_t(s.num_query_lanes) + lane);
        UNROLL for (int k = 0; k < KEYS; k++)
            sums[k] = V::fma(V::set(rows[size_t(k) * size_t(s.head_dim) + d]), query, sums[k]);
    }
    for (int k = 0; k < KEYS; k++) V::store(scores + size_t(key + k) * size_t(s.num_query_lanes) + lane, sums[k]);
}

// output[d][lane] += weight[key][lane] * value[key][d], for DIMS dimensions at a time.
template <class V, int DIMS>
inline void add_values(const AttentionSegment& s, int first_key, int last_key, int dim, int lane, const float* weights,
                       float* output) {
    const size_t lanes = size_t(s.num_query_lanes);
    typename V::T sums[DIMS];
    for (int d = 0; d < DIMS; d++) sums[d] = V::load(output + size_t(dim + d) * lanes + lane);
    for (int key = first_key; key < last_key; key++) {
        const auto weight = V::load(weights + size_t(key) * lanes + lane);
        const float* row = s.values + size_t(key) * size_t(s.head_dim) + dim;
        UNROLL for (int d = 0; d < DIMS; d++) sums[d] = V::fma(V::set(row[d]), weight, sums[d]);
    }
    for (int d = 0; d < DIMS; d++) V::store(output + size_t(dim + d) * lanes + lane, sums[d]);
}

// Largest visible score of each lane; scores of invisible keys become minus infinity.
template <class V>
inline typename V::T mask_and_find_largest(const AttentionSegment& s, int lane, float* scores) {
    const auto first = V::load(s.first_visible + lane), last = V::load(s.last_visible + lane);
    auto largest = V::set(kEmptyScore);
    for (int key = 0; key < s.num_keys; key++) {
        float* place = scores + size_t(key) * size_t(s.num_query_lanes) + lane;
        auto score = V::load(place);
        if (!s.all_visible) {
            score = V::choose(V::set(float(s.first_key + key)), first, last, score, V::set(-INFINITY));
            V::store(place, score);
        }
        largest = V::max(largest, score);
    }
    return largest;
}

// Asks for rows that are needed soon: the hardware does not foresee strides of a row.
inline void read_ahead(const float* rows, int num_rows, int row_size) {
    const auto* bytes = reinterpret_cast<const char*>(rows);
    const size_t size = sizeof(float) * size_t(num_rows) * size_t(row_size);
    for (size_t line = 0; line < size; line += 64) __builtin_prefetch(bytes + line, 0, 2);
}

// V is as wide as it divides num_query_lanes. KEYS keys and DIMS dimensions stay in registers, enough of them that
// their sums hide each other's latency; what is left over goes TAIL at a time. None of them changes a result.
template <class V, int KEYS, int DIMS, int TAIL = 4>
void attend(const AttentionSegment& s, float* scores, const AttentionState& result) {
    constexpr int kKeysAtOnce = 32;  // value rows that stay in the nearest cache while all their dimensions are added
    const size_t lanes = size_t(s.num_query_lanes);
    for (int lane = 0; lane < s.num_query_lanes; lane += V::lanes) {
        int key = 0;
        for (; key + KEYS <= s.num_keys; key += KEYS) {
            if (lane == 0 && key + 2 * KEYS <= s.num_keys) {
                read_ahead(s.keys + size_t(key + KEYS) * size_t(s.head_dim), KEYS, s.head_dim);
                read_ahead(s.values + size_t(key) * size_t(s.head_dim), KEYS, s.head_dim);
            }
            score_keys<V, KEYS>(s, key, lane, scores);
        }
        for (; key + TAIL <= s.num_keys; key += TAIL) score_keys<V, TAIL>(s, key, lane, scores);
        for (; key < s.num_keys; key++) score_keys<V, 1>(s, key, lane, scores);
        const auto largest = mask_and_find_largest<V>(s, lane, scores);
        auto sum = V::set(0.0f);
        for (key = 0; key < s.num_keys; key++) {
            float* place = scores + size_t(key) * lanes + lane;
            const auto weight = exp_negative<V>(V::sub(V::load(place), largest));
            V::store(place, weight);
            sum = V::add(sum, weight);
        }
        V::store(result.largest + lane, largest);
        V::store(result.sum + lane, sum);
        for (int d = 0; d < s.head_dim; d++) V::store(result.output + size_t(d) * lanes + lane, V::set(0.0f));
        for (int first = 0; first < s.num_keys; first += kKeysAtOnce) {
            const int last = first + kKeysAtOnce < s.num_keys ? first + kKeysAtOnce : s.num_keys;
            float* sums = result.output;
            int dim = 0;
            for (; dim + DIMS <= s.head_dim; dim += DIMS) add_values<V, DIMS>(s, first, last, dim, lane, scores, sums);
            for (; dim + TAIL <= s.head_dim; dim += TAIL) add_values<V, TAIL>(s, first, last, dim, lane, scores, sums);
            for (; dim < s.head_dim; dim++) add_values<V, 1>(s, first, last, dim, lane, scores, sums);
        }
    }
}

template <class V>
void merge(const AttentionState& state, const AttentionState& other, int head_dim, int num_query_lanes) {
    const size_t lanes = size_t(num_query_lanes);
    for (int lane = 0; lane < num_query_lanes; lane += V::lanes) {
        const auto mine = V::load(state.largest + lane), theirs = V::load(other.largest + lane);
        const auto largest = V::max(mine, theirs);
        const auto keep = exp_negative<V>(V::sub(mine, largest)), take = exp_negative<V>(V::sub(theirs, largest));
        V::store(state.largest + lane, largest);
        const auto kept_sum = V::mul(V::load(state.sum + lane), keep);
        V::store(state.sum + lane, V::fma(V::load(other.sum + lane), take, kept_sum));
        for (int d = 0; d < head_dim; d++) {
            float* place = state.output + size_t(d) * lanes + lane;
            const auto kept = V::mul(V::load(place), keep);
            V::store(place, V::fma(V::load(other.output + size_t(d) * lanes + lane), take, kept));
        }
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
