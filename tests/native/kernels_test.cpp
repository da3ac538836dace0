// Holds every instruction set that this processor runs to the scalar one, to double precision and to the laws of
// kernels.hpp; prints what differs. Buffers end where their data ends, so that a sanitizer sees any access beyond.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"

using edge::AttentionSegment;
using edge::AttentionState;
using edge::Kernels;
using edge::kPanelRows;
using edge::MatrixShape;
using edge::QuantizedTile;
using Floats = std::vector<float>;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
constexpr double kUnit = 1.0 / (1 << 24);  // half a float's last place: error of one rounding, relative
int num_failures = 0;

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    if (++num_failures > 20) return;
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
}

uint64_t random_state = 1;
uint32_t random_bits() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(random_state >> 33) ^ uint32_t(random_state >> 60);
}
float random_float() { return float(int(random_bits() % 200001) - 100000) / 100000.0f; }
Floats random_floats(size_t count) {
    Floats values(count);
    for (float& value : values) value = random_float();
    return values;
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

void expect_same(const Floats& a, const Floats& b, const std::string& what) {
    for (size_t i = 0; i < a.size(); i++)
        if (!same_bits(a[i], b[i])) return fail("%s: value %zu is %.9g, not %.9g", what.c_str(), i, a[i], b[i]);
}

void expect_near(double value, double expected, double tolerance, const std::string& what) {
    if (!(std::fabs(value - expected) <= tolerance))
        fail("%s: %.9g is not within %.3g of %.9g", what.c_str(), value, tolerance, expected);
}

// ---- quantize and multiply

struct Panel {
    explicit Panel(size_t size) : bytes(static_cast<uint8_t*>(std::aligned_alloc(64, size)), std::free) {}
    std::unique_ptr<uint8_t, void (*)(void*)> bytes;
};

enum class Codes { random, lowest, highest };

Panel make_panel(const MatrixShape& shape, Codes codes) {
    Panel panel(shape.panel_bytes());
    for (size_t i = 0; i < shape.panel_bytes(); i++) {
        const size_t in_block = i % shape.block_bytes();
        uint8_t byte = codes == Codes::random ? uint8_t(random_bits()) : codes == Codes::lowest ? 0 : 255;
        if (in_block < 2 * kPanelRows && in_block % 2) byte = random_bits() & 0xbf;  // scales: finite, some subnormal
        panel.bytes.get()[i] = byte;
    }
    return panel;
}

struct Tile {
    Tile(const MatrixShape& shape, int num_rows)
        : words(size_t(shape.padded_width() / 4 * num_rows), 0x55aa55aa),
          scales(size_t(shape.num_blocks() * num_rows), -7.0f),
          offsets(size_t(shape.num_blocks() * num_rows), -7) {}
    QuantizedTile view() { return {words.data(), scales.data(), offsets.data()}; }
    std::vector<int32_t> words;
    Floats scales;
    std::vector<int32_t> offsets;
};

// Rows `stride` apart, as many different kinds as a tile can hold.
Floats make_rows(const MatrixShape& shape, int num_rows, size_t stride, int first_kind) {
    Floats x(size_t(num_rows - 1) * stride + size_t(shape.width));
    for (int row = 0; row < num_rows; row++) {
        float* values = x.data() + size_t(row) * stride;
        const int kind = (row + first_kind) % 11;
        for (int k = 0; k < shape.width; k++) {
            const float sign = random_bits() % 2 ? 1.0f : -1.0f;
            switch (kind) {
                case 1: values[k] = 3.0f; break;  // every code 127
                case 2: values[k] = -3.0f; break;
                case 3: values[k] = sign * 1e-40f; break;  // below what is told from zero
                case 4: values[k] = 0.0f * sign; break;
                case 5: values[k] = sign * 3.4e38f; break;
                case 6: values[k] = k == shape.width - 1 ? kNaN : random_float(); break;
                case 7: values[k] = k == shape.width / 2 ? -kInfinity : random_float(); break;
                case 8:
                    values[k] = k % shape.block_size == 0 ? 127.0f : float(int(random_bits() % 253) - 126) + 0.5f;
                    break;
                case 9: values[k] = sign * 1.5e-30f; break;
                default: values[k] = random_float() * std::ldexp(1.0f, int(random_bits() % 20) - 10);
            }
        }
    }
    return x;
}

// The words of each block, in an order that does not depend on the instruction set.
std::vector<int32_t> sorted_words(Tile& tile, const MatrixShape& shape, int num_rows) {
    std::vector<int32_t> words = tile.words;
    const auto block_words = shape.block_size / 4 * num_rows;
    for (auto start = words.begin(); start != words.end(); start += block_words) std::sort(start, start + block_words);
    return words;
}

void check_quantize(const Kernels& table, const MatrixShape& shape, const Floats& x, size_t stride, int num_rows,
                    Tile& tile, const std::string& what) {
    Tile expected(shape, num_rows);
    edge::kScalar->quantize(x.data(), stride, num_rows, shape, 0, shape.num_blocks(), expected.view());
    const int middle = shape.num_blocks() / 2;
    table.quantize(x.data(), stride, num_rows, shape, middle, shape.num_blocks(), tile.view());
    table.quantize(x.data(), stride, num_rows, shape, 0, middle, tile.view());
    expect_same(tile.scales, expected.scales, what + " scales");
    if (tile.offsets != expected.offsets) fail("%s: offsets differ", what.c_str());
    if (sorted_words(tile, shape, num_rows) != sorted_words(expected, shape, num_rows))
        fail("%s: codes differ", what.c_str());
}

// Each row of any tile must be what the scalar table makes of that row alone.
void check_multiply(const Kernels& table, const MatrixShape& shape, Codes codes, int num_rows, int first_kind) {
    const std::string what = std::string(table.name) + " bits " + std::to_string(shape.bits) + " block " +
                             std::to_string(shape.block_size) + " width " + std::to_string(shape.width) + " rows " +
                             std::to_string(num_rows) + " kind " + std::to_string(first_kind);
    const Panel panel = make_panel(shape, codes);
    const size_t stride = size_t(shape.width) + 3;
    const Floats x = make_rows(shape, num_rows, stride, first_kind);
    Tile tile(shape, num_rows);
    check_quantize(table, shape, x, stride, num_rows, tile, what);
    Floats y(size_t(num_rows) * kPanelRows, -7.0f);
    table.multiply(panel.bytes.get(), shape, tile.view(), num_rows, y.data());
    for (int row = 0; row < num_rows; row++) {
        Tile single(shape, 1);
        Floats expected(kPanelRows, -8.0f);
        edge::kScalar->quantize(x.data() + size_t(row) * stride, stride, 1, shape, 0, shape.num_blocks(),
                                single.view());
        edge::kScalar->multiply(panel.bytes.get(), shape, single.view(), 1, expected.data());
        const auto start = y.begin() + row * kPanelRows;
        expect_same(Floats(start, start + kPanelRows), expected, what + " row " + std::to_string(row));
    }
}

void check_matrices(const Kernels& table) {
    for (const int bits : {4, 8})
        for (const int block_size : {32, 64, 128, 256})
            for (const int width : {1, block_size - 1, block_size, 2 * block_size + 9, 3 * block_size + 24})
                for (int num_rows = 1; num_rows <= edge::kMaxTileRows; num_rows++)
                    for (const Codes codes : {Codes::random, Codes::lowest, Codes::highest})
                        check_multiply(table, {kPanelRows, width, bits, block_size}, codes, num_rows,
                                       int(random_bits() % 11));
}

// The scalar multiply itself, against exact sums in double precision: one rounding to float for each product and sum.
void check_scalar_multiply() {
    for (const int bits : {4, 8}) {
        const MatrixShape shape{kPanelRows, 150, bits, 64};
        const Panel panel = make_panel(shape, Codes::random);
        const Floats x = random_floats(150);
        Tile tile(shape, 1);
        Floats y(kPanelRows);
        edge::kScalar->quantize(x.data(), 150, 1, shape, 0, shape.num_blocks(), tile.view());
        edge::kScalar->multiply(panel.bytes.get(), shape, tile.view(), 1, y.data());
        for (int column = 0; column < kPanelRows; column++) {
            double expected = 0.0, magnitude = 0.0;
            for (int k = 0; k < 150; k++) {
                const uint8_t* block = panel.bytes.get() + size_t(k / 64) * shape.block_bytes();
                uint16_t half;
                std::memcpy(&half, block + 2 * column, 2);
                const double fraction = half & 1023, exponent = half >> 10 & 31, sign = half >> 15 ? -1.0 : 1.0;
                const double scale = sign * (exponent == 0 ? std::ldexp(fraction, -24)
                                                           : std::ldexp(1024.0 + fraction, int(exponent) - 25));
                const int in_block = k % 64, byte = in_block * bits / 8;
                const uint8_t stored =
                    block[2 * kPanelRows + (size_t(byte / 4) * kPanelRows + size_t(column)) * 4 + size_t(byte % 4)];
                const int code = bits == 8 ? stored : k % 2 ? stored >> 4 : stored & 15;
                // 127 steps to the largest value: an activation is off by half of one
                const double x_scale = double(tile.scales[size_t(k / 64)]), weight = scale * (code - shape.middle());
                expected += weight * x[size_t(k)];
                magnitude += std::fabs(weight) * x_scale;
            }
            expect_near(y[size_t(column)], expected, 0.5001 * magnitude,
                        "scalar multiply, " + std::to_string(bits) + " bits");
        }
    }
}

// ---- attention

struct Attention {
    int num_queries, lanes, head_dim, num_keys, first_key;
    Floats queries, keys, values, first_visible, last_visible;  // queries [head_dim][lanes]

    Attention(int num_queries, int lanes, int head_dim, int num_keys, int first_key)
        : num_queries(num_queries),
          lanes(lanes),
          head_dim(head_dim),
          num_keys(num_keys),
          first_key(first_key),
          queries(size_t(head_dim * lanes)),
          keys(random_floats(size_t(num_keys * head_dim))),
          values(random_floats(size_t(num_keys * head_dim))),
          first_visible(size_t(lanes), 1.0f),
          last_visible(size_t(lanes), 0.0f) {
        for (int d = 0; d < head_dim; d++)
            for (int query = 0; query < num_queries; query++) queries[size_t(d * lanes + query)] = random_float();
        see(first_key, first_key + num_keys - 1);
    }

    // Scores of keys up to `last` near +150, the others' near -150.
    void raise_until(int last) {
        for (int query = 0; query < num_queries; query++) queries[size_t(query)] = 15.0f;
        for (int key = 0; key < num_keys; key++) keys[size_t(key * head_dim)] = key < last ? 10.0f : -10.0f;
    }

    void see(int first, int last) {
        for (int query = 0; query < num_queries; query++) {
            first_visible[size_t(query)] = float(first);
            last_visible[size_t(query)] = float(std::max(first, last - query % 3));  // as causal rows differ
        }
    }

    bool sees(int query, int key) const {
        return first_visible[size_t(query)] <= float(first_key + key) &&
               float(first_key + key) <= last_visible[size_t(query)];
    }

    // Keys [first, last) only.
    Attention part(int first, int last) const {
        Attention result = *this;
        result.num_keys = last - first;
        result.first_key = first_key + first;
        result.keys.assign(keys.begin() + first * head_dim, keys.begin() + last * head_dim);
        result.values.assign(values.begin() + first * head_dim, values.begin() + last * head_dim);
        return result;
    }

    // The same queries, in lanes [lane, lane + num_queries) of `num_lanes`.
    Attention moved(int lane, int num_lanes) const {
        Attention result = *this;
        result.lanes = num_lanes;
        result.queries.assign(size_t(head_dim * num_lanes), 0.0f);
        result.first_visible.assign(size_t(num_lanes), 1.0f);
        result.last_visible.assign(size_t(num_lanes), 0.0f);
        for (int query = 0; query < num_queries; query++) {
            for (int d = 0; d < head_dim; d++)
                result.queries[size_t(d * num_lanes + lane + query)] = queries[size_t(d * lanes + query)];
            result.first_visible[size_t(lane + query)] = first_visible[size_t(query)];
            result.last_visible[size_t(lane + query)] = last_visible[size_t(query)];
        }
        return result;
    }
};

struct State {
    State(int lanes, int head_dim)
        : largest(size_t(lanes), 7.0f), sum(size_t(lanes), 7.0f), output(size_t(lanes * head_dim), 7.0f) {}
    AttentionState view() { return {largest.data(), sum.data(), output.data()}; }
    // Largest, sum and output of `count` lanes from `lane` on.
    Floats of_lanes(int lane, int count) const {
        Floats all;
        const int lanes = int(sum.size());
        for (const Floats* part : {&largest, &sum, &output})
            for (int i = 0; i < int(part->size()); i++)
                if (i % lanes >= lane && i % lanes < lane + count) all.push_back((*part)[size_t(i)]);
        return all;
    }
    Floats largest, sum, output;
};

State attend(const Kernels& table, const Attention& a, bool all_visible = false) {
    State state(a.lanes, a.head_dim);
    Floats scores(size_t(edge::kSegmentKeys * a.lanes));
    const AttentionSegment segment{a.queries.data(),      a.lanes,    a.head_dim,  a.keys.data(),
                                   a.values.data(),       a.num_keys, a.first_key, a.first_visible.data(),
                                   a.last_visible.data(), all_visible};
    table.attend(segment, scores.data(), state.view());
    return state;
}

// Softmax over the visible keys in double precision. An error d of a score is a factor of 1 + d on a weight, and scores
// sum head_dim products, each below 1: d < head_dim * |score|_1 * 2^-24. exp adds 2^-22, sums a rounding for each key.
void expect_attention(const Attention& a, const State& state, const std::string& what) {
    for (int query = 0; query < a.num_queries; query++) {
        std::vector<double> weights(size_t(a.num_keys), 0.0), output(size_t(a.head_dim), 0.0);
        double largest = -1e300, sum = 0.0, most = 0.0;
        for (int key = 0; key < a.num_keys; key++) {
            double absolute = 0.0;
            for (int d = 0; d < a.head_dim; d++) {
                const double product =
                    double(a.queries[size_t(d * a.lanes + query)]) * double(a.keys[size_t(key * a.head_dim + d)]);
                weights[size_t(key)] += product, absolute += std::fabs(product);
            }
            most = std::max(most, absolute);
            if (a.sees(query, key)) largest = std::max(largest, weights[size_t(key)]);
        }
        for (int key = 0; key < a.num_keys; key++) {
            if (!a.sees(query, key)) continue;
            const double weight = std::exp(weights[size_t(key)] - largest);
            sum += weight;
            for (int d = 0; d < a.head_dim; d++)
                output[size_t(d)] += weight * double(a.values[size_t(key * a.head_dim + d)]);
        }
        const double tolerance = 2.0 * (2.0 * a.head_dim * most + 8.0 + 2.0 * a.num_keys) * kUnit;
        for (int d = 0; d < a.head_dim; d++) {
            const double value = double(state.output[size_t(d * a.lanes + query)]) / double(state.sum[size_t(query)]);
            expect_near(value, output[size_t(d)] / sum, tolerance, what);
        }
    }
}

void check_attention(const Kernels& table, int num_queries, int head_dim, int num_keys, bool raised) {
    const std::string what = std::string(table.name) + " attend, queries " + std::to_string(num_queries) + " dims " +
                             std::to_string(head_dim) + " keys " + std::to_string(num_keys);
    const int lanes = num_queries > 8 ? 16 : 8;
    Attention a(num_queries, lanes, head_dim, num_keys, 1000);
    const int hidden = num_keys / 3;
    if (raised) a.raise_until(hidden);  // what is not to be seen would outweigh all the rest
    a.see(1000 + hidden, 1000 + num_keys - 1);
    const State whole = attend(table, a);
    expect_attention(a, whole, what);
    const Floats expected = whole.of_lanes(0, num_queries);
    expect_same(attend(table, a.part(hidden, num_keys)).of_lanes(0, num_queries), expected,
                what + ", without the invisible keys");
    for (const int lane : {0, 5, 16 - num_queries})
        if (lane + num_queries <= 16)
            expect_same(attend(table, a.moved(lane, 16)).of_lanes(lane, num_queries), expected,
                        what + ", in other lanes");
    if (num_queries < 8)
        expect_same(attend(table, a.moved(1, 8)).of_lanes(1, num_queries), expected, what + ", one lane on");

    Attention open = a;
    std::fill(open.first_visible.begin(), open.first_visible.end(), 0.0f);
    std::fill(open.last_visible.begin(), open.last_visible.end(), 9999.0f);
    expect_same(attend(table, open, true).of_lanes(0, lanes), attend(table, open).of_lanes(0, lanes),
                what + ", all visible");

    Attention blind = a;
    blind.see(5000, 5000);
    State empty = attend(table, blind), merged = whole;
    table.merge(merged.view(), empty.view(), head_dim, lanes);
    expect_same(merged.of_lanes(0, num_queries), expected, what + ", an empty segment behind");
    table.merge(empty.view(), merged.view(), head_dim, lanes);
    expect_same(empty.of_lanes(0, num_queries), expected, what + ", an empty segment before");

    State halves = attend(table, a.part(0, num_keys / 2)), second = attend(table, a.part(num_keys / 2, num_keys));
    table.merge(halves.view(), second.view(), head_dim, lanes);
    expect_attention(a, halves, what + ", merged");

    a.keys[size_t((num_keys - 1) * head_dim)] = kNaN;
    a.see(1000, 1000 + num_keys + 5);
    if (!std::isnan(attend(table, a).sum[0])) fail("%s: a NaN is lost", what.c_str());
}

// ---- rows

double gelu(double x) { return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))); }

void check_activations(const Kernels& table, int count) {
    const std::string what = std::string(table.name) + " of " + std::to_string(count);
    Floats x = random_floats(size_t(count)), y(x.size());
    const Floats other = random_floats(size_t(count));
    for (float& value : x) value *= 12.0f;
    table.gelu_multiply(x.data(), other.data(), y.data(), count);
    // tanh to 4e-7 relative and absolute below 1, then at most |x| / 2 of it
    for (int i = 0; i < count; i++)
        expect_near(y[size_t(i)], gelu(x[size_t(i)]) * other[size_t(i)], 1e-6 * std::fabs(x[size_t(i)]),
                    what + " gelu");
    table.softcap(x.data(), 5.0f, y.data(), count);
    for (int i = 0; i < count; i++)
        expect_near(y[size_t(i)], 5.0 * std::tanh(x[size_t(i)] / 5.0), 5.0 * 1e-6, what + " softcap");
    for (const int place : {0, count - 1}) {
        Floats holed = x;
        holed[size_t(place)] = kNaN;
        table.gelu_multiply(holed.data(), other.data(), y.data(), count);
        if (!std::isnan(y[size_t(place)])) fail("%s gelu: a NaN is lost", what.c_str());
        table.softcap(holed.data(), 5.0f, y.data(), count);
        if (!std::isnan(y[size_t(place)])) fail("%s softcap: a NaN is lost", what.c_str());
        if (!std::isnan(table.largest(holed.data(), count))) fail("%s largest: a NaN is lost", what.c_str());
        holed[size_t(place)] = 100.5f;
        if (table.largest(holed.data(), count) != 100.5f) fail("%s largest: misses %d", what.c_str(), place);
        holed[size_t(place)] = -kInfinity;
        if (!(table.largest(holed.data(), count) < 100.0f)) fail("%s largest: minus infinity", what.c_str());
    }
    const Floats edges = {0.0f, -0.0f, 1e-30f, -1e4f, 1e4f, kInfinity, -20.0f, 20.0f};
    const Floats ones(edges.size(), 1.0f);
    Floats results(edges.size());
    table.gelu_multiply(edges.data(), ones.data(), results.data(), int(edges.size()));
    for (size_t i = 0; i < edges.size(); i++)
        if (std::isfinite(edges[i]))
            expect_near(results[i], gelu(edges[i]), 1e-6 * std::fabs(edges[i]), what + " gelu at the edges");
    if (results[5] != kInfinity) fail("%s gelu: %g of infinity", what.c_str(), results[5]);
    table.softcap(edges.data(), 30.0f, results.data(), int(edges.size()));
    for (size_t i = 0; i < edges.size(); i++)
        expect_near(results[i], 30.0 * std::tanh(edges[i] / 30.0), 3e-5, what + " softcap at the edges");
}

std::vector<double> rms_norm(const std::vector<double>& x, const float* weight, double epsilon) {
    double squares = 0.0;
    for (const double value : x) squares += value * value;
    const double root = std::sqrt(squares / double(x.size()) + epsilon);
    std::vector<double> y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = x[i] / root * (weight ? double(weight[i]) : 1.0);
    return y;
}

// A sum of `size` squares is off by size * 2^-24 at most, its root by half of that; some roundings more.
double norm_error(int size) { return (size / 2.0 + 8.0) * kUnit; }

void check_norms(const Kernels& table, int size) {
    const std::string what = std::string(table.name) + " norm of " + std::to_string(size);
    const size_t count = size_t(size);
    Floats x = random_floats(count);
    const Floats weight = random_floats(count), residual = random_floats(count), next = random_floats(count);
    Floats total(count), normed(count, 7.0f), alone(count), untouched(1, 7.0f);
    table.norm_add(x.data(), weight.data(), residual.data(), size, 1e-6f, 0.5f, total.data(), next.data(), 1e-5f,
                   normed.data());
    std::vector<double> unit = rms_norm({x.begin(), x.end()}, weight.data(), 1e-6);
    for (size_t i = 0; i < count; i++)
        expect_near(total[i], 0.5 * (residual[i] + unit[i]), norm_error(size) * (1.0 + std::fabs(unit[i])),
                    what + " and add");
    const std::vector<double> expected = rms_norm({total.begin(), total.end()}, next.data(), 1e-5);
    for (size_t i = 0; i < count; i++)
        expect_near(normed[i], expected[i], norm_error(size) * (1.0 + std::fabs(expected[i])), what + ", the next");
    table.norm_add(x.data(), weight.data(), residual.data(), size, 1e-6f, 0.5f, alone.data(), nullptr, 0.0f,
                   untouched.data());
    expect_same(alone, total, what + ", without a next");
    x[count - 1] = kNaN;
    table.norm_add(x.data(), weight.data(), residual.data(), size, 1e-6f, 0.5f, total.data(), next.data(), 1e-5f,
                   normed.data());
    for (size_t i = 0; i < count; i++)
        if (!std::isnan(total[i]) || !std::isnan(normed[i])) return fail("%s: a NaN is lost", what.c_str());
}

void check_rotate(const Kernels& table, int size) {
    const std::string what = std::string(table.name) + " rotate of " + std::to_string(size);
    const size_t count = size_t(size), half = count / 2;
    const Floats x = random_floats(count), weight = random_floats(count);
    Floats cos(half), sin(half), y(count);
    for (size_t i = 0; i < half; i++) cos[i] = std::cos(float(i)), sin[i] = std::sin(float(i));
    for (const float* w : {weight.data(), static_cast<const float*>(nullptr)}) {
        const std::vector<double> unit = rms_norm({x.begin(), x.end()}, w, 1e-6);
        table.norm_rotate(x.data(), w, size, 1e-6f, nullptr, nullptr, y.data());
        for (size_t i = 0; i < count; i++)
            expect_near(y[i], unit[i], norm_error(size) * (1.0 + std::fabs(unit[i])), what + ", norm only");
        table.norm_rotate(x.data(), w, size, 1e-6f, cos.data(), sin.data(), y.data());
        for (size_t i = 0; i < count; i++) {
            const double a = unit[i % half], b = unit[half + i % half], c = cos[i % half], s = sin[i % half];
            expect_near(y[i], i < half ? a * c - b * s : b * c + a * s,
                        2.0 * norm_error(size) * (1.0 + std::fabs(a) + std::fabs(b)), what);
        }
    }
}

void check(const Kernels& table) {
    if (table.max_single_tile_rows > edge::kMaxTileRows || table.num_tile_rows > edge::kMaxTileRows ||
        table.num_tile_rows < 1)
        fail("%s: tiles of %d and %d rows", table.name, table.max_single_tile_rows, table.num_tile_rows);
    if (!edge::force_kernels(table.name) || &edge::kernels() != &table) fail("%s cannot be forced", table.name);
    check_matrices(table);
    for (const int num_queries : {1, 3, 8, 16})
        for (const int head_dim : {20, 64, 256})
            for (const int num_keys : {2, 7, 33, edge::kSegmentKeys})
                for (const bool raised : {false, true}) check_attention(table, num_queries, head_dim, num_keys, raised);
    for (const int size : {1, 7, 8, 16, 40, 1000}) check_activations(table, size);
    for (const int size : {2, 10, 16, 256, 1536}) check_norms(table, size), check_rotate(table, size);
}

}  // namespace

int main() {
    check_scalar_multiply();
    const Kernels& best = edge::kernels();
    for (int i = 0; const Kernels* table = edge::runnable_kernels(i); i++) {
        check(*table);
        std::printf("%s%s\n", table->name, table == &best ? " (best)" : "");
    }
    if (edge::force_kernels("no such instruction set")) fail("an unknown instruction set was taken");
    if (!edge::force_kernels(nullptr) || &edge::kernels() != &best) fail("the best one is not chosen again");
    std::printf("%d failures\n", num_failures);
    return num_failures != 0;
}
