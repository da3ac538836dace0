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

#include "float16.hpp"
#include "kernels.hpp"

using edge::AttentionSegment;
using edge::AttentionState;
using edge::Kernels;
using edge::KvType;
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

constexpr KvType kTypes[] = {KvType::float32, KvType::float16, KvType::int8};
const char* name_of(KvType type) {
    return type == KvType::float32 ? "float32" : type == KvType::float16 ? "float16" : "int8";
}

float half_at(const uint8_t* place) {
    uint16_t half;
    std::memcpy(&half, place, sizeof half);
    return float_of_half(half);
}

// Value d of a row, by the format's description.
double value_of(KvType type, const uint8_t* row, int head_dim, int d) {
    if (type == KvType::float16) return double(half_at(row + 2 * d));
    if (type == KvType::int8) return int8_t(row[d]) * double(half_at(row + head_dim + d / 64 * 2));
    float value;
    std::memcpy(&value, row + 4 * d, sizeof value);
    return double(value);
}

// Rows of the KV cache.
struct Rows {
    Rows(KvType type, int head_dim, int num_rows)
        : type(type),
          head_dim(head_dim),
          row_bytes(size_t(edge::kv_row_bytes(type, head_dim))),
          bytes(size_t(num_rows) * row_bytes) {
        for (int row = 0; row < num_rows; row++) store(row, random_floats(size_t(head_dim)));
    }
    void store(int row, const Floats& values) {
        edge::kScalar->store_row(values.data(), head_dim, type, bytes.data() + size_t(row) * row_bytes);
    }
    double at(int row, int d) const { return value_of(type, bytes.data() + size_t(row) * row_bytes, head_dim, d); }
    Rows part(int first, int last) const {
        Rows result(type, head_dim, 0);
        result.bytes.assign(bytes.begin() + first * long(row_bytes), bytes.begin() + last * long(row_bytes));
        return result;
    }
    KvType type;
    int head_dim;
    size_t row_bytes;
    std::vector<uint8_t> bytes;
};

struct Attention {
    int num_queries, head_dim, num_keys, row_size;
    Floats queries;  // [kTileQueries][row_size]
    Rows keys, values;

    Attention(KvType type, int num_queries, int head_dim, int num_keys)
        : num_queries(num_queries),
          head_dim(head_dim),
          num_keys(num_keys),
          row_size((head_dim + edge::kRowFloats - 1) / edge::kRowFloats * edge::kRowFloats),
          queries(size_t(edge::kTileQueries * row_size)),
          keys(type, head_dim, num_keys),
          values(type, head_dim, num_keys) {
        for (int query = 0; query < num_queries; query++)
            for (int d = 0; d < head_dim; d++) queries[size_t(query * row_size + d)] = random_float();
    }

    // Keys [first, last).
    Attention part(int first, int last) const {
        Attention result = *this;
        result.num_keys = last - first;
        result.keys = keys.part(first, last);
        result.values = values.part(first, last);
        return result;
    }

    // Query `from` in the place of query `to`, alone with zeros before it.
    Attention moved(int from, int to) const {
        Attention result = *this;
        result.num_queries = to + 1;
        std::fill(result.queries.begin(), result.queries.end(), 0.0f);
        std::copy_n(queries.begin() + from * row_size, row_size, result.queries.begin() + to * row_size);
        return result;
    }
};

struct State {
    State(int head_dim, int row_size)
        : head_dim(head_dim),
          row_size(row_size),
          largest(edge::kTileQueries, 7.0f),
          sum(edge::kTileQueries, 7.0f),
          output(size_t(edge::kTileQueries * row_size), 7.0f) {}
    AttentionState view() { return {largest.data(), sum.data(), output.data()}; }
    // Largest, sum and output of one query.
    Floats of(int query) const {
        Floats all = {largest[size_t(query)], sum[size_t(query)]};
        const auto row = output.begin() + query * row_size;
        all.insert(all.end(), row, row + head_dim);
        return all;
    }
    int head_dim, row_size;
    Floats largest, sum, output;
};

State attend(const Kernels& table, const Attention& a, bool reads_ahead = false) {
    State state(a.head_dim, a.row_size);
    Floats scores(edge::kScoreFloats);
    const AttentionSegment segment{
        a.queries.data(),    a.num_queries,         a.head_dim, a.row_size, a.keys.type,
        a.keys.bytes.data(), a.values.bytes.data(), a.num_keys, reads_ahead};
    table.attend(segment, scores.data(), state.view());
    return state;
}

// Softmax over the keys in double precision. An error d of a score is a factor of 1 + d on a weight, and scores sum
// head_dim products, each below 1: d < head_dim * |score|_1 * 2^-24. exp adds 2^-22, sums a rounding for each key, and
// in int8 each value one more, of its product with the scale.
void expect_attention(const Attention& a, const State& state, const std::string& what) {
    for (int query = 0; query < a.num_queries; query++) {
        std::vector<double> weights(size_t(a.num_keys), 0.0), output(size_t(a.head_dim), 0.0);
        double largest = -1e300, sum = 0.0, most = 0.0;
        for (int key = 0; key < a.num_keys; key++) {
            double absolute = 0.0;
            for (int d = 0; d < a.head_dim; d++) {
                const double product = double(a.queries[size_t(query * a.row_size + d)]) * a.keys.at(key, d);
                weights[size_t(key)] += product, absolute += std::fabs(product);
            }
            most = std::max(most, absolute);
            largest = std::max(largest, weights[size_t(key)]);
        }
        for (int key = 0; key < a.num_keys; key++) {
            const double weight = std::exp(weights[size_t(key)] - largest);
            sum += weight;
            for (int d = 0; d < a.head_dim; d++) output[size_t(d)] += weight * a.values.at(key, d);
        }
        const double tolerance = 2.0 * (2.0 * a.head_dim * most + 8.0 + 2.0 * a.num_keys) * kUnit;
        const Floats found = state.of(query);
        for (int d = 0; d < a.head_dim; d++)
            expect_near(double(found[size_t(2 + d)]) / double(found[1]), output[size_t(d)] / sum, tolerance, what);
    }
}

void check_attention(const Kernels& table, KvType type, int num_queries, int head_dim, int num_keys) {
    const std::string what = std::string(table.name) + " attend " + name_of(type) + ", queries " +
                             std::to_string(num_queries) + " dims " + std::to_string(head_dim) + " keys " +
                             std::to_string(num_keys);
    Attention a(type, num_queries, head_dim, num_keys);
    const State whole = attend(table, a);
    expect_attention(a, whole, what);
    for (int query = 0; query < num_queries; query++) {
        expect_same(attend(table, a, true).of(query), whole.of(query), what + ", reading ahead");
        for (const int place : {0, 3, edge::kTileQueries - 1})
            expect_same(attend(table, a.moved(query, place)).of(place), whole.of(query), what + ", in another place");
    }
    for (const int first : {0, 1}) {
        for (const int last : {num_keys - 1, num_keys}) {
            if (first >= last) continue;
            const Attention part = a.part(first, last);
            expect_attention(part, attend(table, part), what + ", a part");
        }
    }
    Floats holed = random_floats(size_t(head_dim));
    holed.back() = kNaN;
    a.values.store(num_keys - 1, holed);
    if (!std::isnan(attend(table, a).of(0).back())) fail("%s: a NaN of a value is lost", what.c_str());
    a.keys.store(0, holed);
    const State spoiled = attend(table, a);
    for (int query = 0; query < num_queries; query++)
        if (!std::isnan(spoiled.sum[size_t(query)])) fail("%s: a NaN of a key is lost", what.c_str());
}

void check_scale_add(const Kernels& table, int count) {
    const std::string what = std::string(table.name) + " scale and add " + std::to_string(count);
    const Floats x = random_floats(size_t(count));
    Floats y = random_floats(size_t(count));
    const Floats before = y;
    table.scale_add(x.data(), 0.25f, 0.75f, y.data(), count);
    for (size_t i = 0; i < y.size(); i++)
        expect_near(y[i], 0.25 * double(before[i]) + 0.75 * double(x[i]), 4.0 * kUnit, what);
    y = before;
    table.scale_add(x.data(), 0.0f, 1.0f, y.data(), count);
    expect_same(y, x, what + ", nothing kept");
}

// Every float16 comes back from its float, and what lies between two goes to the nearer one, halfway to the even one.
void check_halves(const Kernels& table) {
    const std::string what = std::string(table.name) + " to halves";
    const auto store = [&](const float* values, int count, uint16_t* halves) {
        table.store_row(values, count, KvType::float16, reinterpret_cast<uint8_t*>(halves));
    };
    Floats x;
    std::vector<uint16_t> expected;
    const auto add = [&](double value, uint32_t half) {
        x.push_back(float(value)), expected.push_back(uint16_t(half));
        x.push_back(float(-value)), expected.push_back(uint16_t(half | 0x8000u));
    };
    for (uint32_t half = 0; half < 0x7c00u; half++) {
        const double value = double(float_of_half(uint16_t(half)));
        const double next = half == 0x7bffu ? 65536.0 : double(float_of_half(uint16_t(half + 1)));
        add(value, half);
        add((value + next) / 2, half + half % 2);
        add(value + (next - value) * 0.4990234375, half);
        add(value + (next - value) * 0.5009765625, half + 1);
    }
    add(1e-30, 0), add(1e30, 0x7c00u), add(double(INFINITY), 0x7c00u);
    for (const size_t skipped : {size_t(0), size_t(3)}) {
        const size_t count = x.size() - skipped;
        std::vector<uint16_t> found(count, 0xffffu);
        store(x.data() + skipped, int(count), found.data());
        if (!std::equal(found.begin(), found.end(), expected.begin() + long(skipped))) fail("%s", what.c_str());
    }
    uint16_t found = 0;
    store(&kNaN, 1, &found);
    if (!std::isnan(float_of_half(found))) fail("%s: a NaN is lost", what.c_str());
}

// Codes of int8 are at most half a step off and the same in every instruction set; what is no number spoils its block
// alone. The row and its buffer end together.
void check_codes(const Kernels& table, int head_dim) {
    const std::string what = std::string(table.name) + " int8 row of " + std::to_string(head_dim);
    const size_t row_bytes = size_t(edge::kv_row_bytes(KvType::int8, head_dim));
    for (const float size : {1.0f, 0.0f, 1e-7f, 1e-4f, 3e4f, 1e30f, kInfinity, kNaN}) {
        Floats x = random_floats(size_t(head_dim));
        if (std::isfinite(size))
            for (float& value : x) value *= size;
        else x[size_t(head_dim / 2)] = size;
        std::vector<uint8_t> row(row_bytes, 0x55), expected(row_bytes, 0xaa);
        table.store_row(x.data(), head_dim, KvType::int8, row.data());
        edge::kScalar->store_row(x.data(), head_dim, KvType::int8, expected.data());
        if (row != expected) fail("%s: other bytes than the scalar ones for values of %g", what.c_str(), double(size));
        for (int d = 0; d < head_dim; d++) {
            const bool is_spoiled = size == 1e30f || (!std::isfinite(size) && d / 64 == head_dim / 2 / 64);
            const double found = value_of(KvType::int8, row.data(), head_dim, d);
            const double scale = double(half_at(&row[size_t(head_dim + d / 64 * 2)]));
            // 127 steps of a scale that is rounded by half of float16's smallest number
            if (!is_spoiled) expect_near(found, x[size_t(d)], scale * 0.5001 + 127.0 * std::ldexp(1.0, -25), what);
            else if (!std::isnan(found)) fail("%s: value %d of a spoiled block is a number", what.c_str(), d);
        }
    }
    Floats halfway(size_t(head_dim), 0.5f);
    for (int d = 0; d < head_dim; d++) halfway[size_t(d)] = d % 64 == 0 ? 127.0f : float(d % 64) - 31.5f;
    std::vector<uint8_t> row(row_bytes);
    table.store_row(halfway.data(), head_dim, KvType::int8, row.data());
    for (int d = 0; d < head_dim; d++)
        if (int8_t(row[size_t(d)]) != int(std::nearbyint(halfway[size_t(d)]))) fail("%s: halfway", what.c_str());
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
    for (const KvType type : kTypes)
        for (const int num_queries : {1, 3, 4, 5, edge::kTileQueries})
            for (const int head_dim : {6, 20, 64, 72, 150, 256})
                for (const int num_keys : {1, 2, 7, 33, edge::kMaxSegmentKeys})
                    check_attention(table, type, num_queries, head_dim, num_keys);
    for (const int head_dim : {4, 6, 64, 72, 150, 512}) check_codes(table, head_dim);
    for (const int count : {1, 7, 8, 16, 40}) check_scale_add(table, count);
    check_halves(table);
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
