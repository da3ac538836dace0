#include "matmul_op.hpp"

#include <algorithm>
#include <cstring>

namespace edge {
namespace {

constexpr int kMaxSide = 1 << 24;                // rows or columns of a matrix
constexpr int64_t kMaxActivations = 1ll << 31;   // values of x or y
constexpr int64_t kInlineValues = 16384;         // quantizing fewer takes less than handing it to other threads
constexpr size_t kInlineWeightBytes = 48 << 10;  // so does multiplying with fewer weights
constexpr int kPanelsAtOnce = 8;                 // of one stream of weights, before the other one goes on

MatrixShape read_shape(const Attributes& attributes) {
    MatrixShape shape{};
    shape.width = attributes.integer("K", 1, kMaxSide);
    shape.num_rows = attributes.integer("N", 1, kMaxSide);
    shape.bits = attributes.integer("bits", 4, 8);
    shape.block_size = attributes.integer("block_size", 32, 4096);
    require(shape.bits == 4 || shape.bits == 8, "bits must be 4 or 8");
    require(shape.block_size % 32 == 0, "block_size must be a multiple of 32");
    return shape;
}

void check_weights(const Tensor& weights, const MatrixShape& shape) {
    if (weights.size() != int64_t(shape.bytes()))
        throw OpError("the weights are " + std::to_string(weights.size()) + " bytes, expected " +
                      std::to_string(shape.bytes()));
    require(reinterpret_cast<uintptr_t>(weights.data) % 64 == 0, "the weights are not aligned to 64 bytes");
}

// The rows of x, quantized in tiles. All threads take part; nobody multiplies before all tiles are there.
class QuantizedRows {
   public:
    QuantizedRows(const float* x, int num_rows, const MatrixShape& shape, const Kernels& kernels, Scratch& scratch)
        : x_(x),
          num_rows_(num_rows),
          shape_(shape),
          kernels_(kernels),
          tile_rows_(num_rows <= kernels.max_single_tile_rows ? num_rows : kernels.num_tile_rows),
          claims_(num_pieces()),
          phase_(num_pieces()) {
        const size_t rows = size_t(num_rows), blocks = size_t(shape.num_blocks());
        const size_t words = rows * size_t(shape.padded_width()) / 4;
        auto* memory = static_cast<int32_t*>(scratch.get(4 * (words + 2 * rows * blocks) + 64));
        whole_ = {memory, reinterpret_cast<float*>(memory + words), memory + words + rows * blocks};
    }

    int num_tiles() const { return (num_rows_ + tile_rows_ - 1) / tile_rows_; }
    int first_row(int tile) const { return tile * tile_rows_; }
    int rows_of(int tile) const { return std::min(tile_rows_, num_rows_ - first_row(tile)); }
    bool is_small() const { return int64_t(num_rows_) * shape_.width <= kInlineValues; }

    QuantizedTile tile(int index) const {
        const size_t row = size_t(first_row(index)), blocks = size_t(shape_.num_blocks());
        return {whole_.words + row * size_t(shape_.padded_width()) / 4, whole_.scales + row * blocks,
                whole_.offsets + row * blocks};
    }

    // Takes part in quantizing and returns when every tile is done.
    void quantize() {
        for (int first, last; claims_.next(first, last); phase_.done(last - first))
            for (int piece = first; piece < last; piece++) quantize_piece(piece);
        phase_.wait();
    }

   private:
    static constexpr int kPiecesOfATile = 8;  // so that one tile keeps several threads busy

    int num_pieces() const { return num_tiles() * kPiecesOfATile; }

    void quantize_piece(int piece) {
        const int index = piece / kPiecesOfATile, part = piece % kPiecesOfATile, blocks = shape_.num_blocks();
        const int first = blocks * part / kPiecesOfATile, last = blocks * (part + 1) / kPiecesOfATile;
        const float* rows = x_ + size_t(first_row(index)) * size_t(shape_.width);
        kernels_.quantize(rows, size_t(shape_.width), rows_of(index), shape_, first, last, tile(index));
    }

    const float* x_;
    const int num_rows_;
    const MatrixShape& shape_;
    const Kernels& kernels_;
    const int tile_rows_;
    QuantizedTile whole_{};
    Claims claims_;
    Phase phase_;
};

// y[num_rows][kPanelRows]: one tile times kPanelRows matrix rows from `first_row` on, at most up to the last panel's end.
void multiply_rows(const Kernels& kernels, const uint8_t* weights, const MatrixShape& shape, int first_row,
                   const QuantizedTile& tile, int num_rows, float* y) {
    const int panel = first_row / kPanelRows, shift = first_row % kPanelRows;
    const uint8_t* start = weights + size_t(panel) * shape.panel_bytes();
    kernels.multiply(start, shape, tile, num_rows, y);
    if (shift == 0) return;
    float next[kMaxTileRows * kPanelRows] = {};
    if (panel + 1 < shape.num_panels()) kernels.multiply(start + shape.panel_bytes(), shape, tile, num_rows, next);
    for (int row = 0; row < num_rows; row++) {
        float* mine = y + row * kPanelRows;
        std::memmove(mine, mine + shift, sizeof(float) * size_t(kPanelRows - shift));
        std::memcpy(mine + kPanelRows - shift, next + row * kPanelRows, sizeof(float) * size_t(shift));
    }
}

Scratch& activation_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

}  // namespace

QuantizedMatMul::QuantizedMatMul(const Attributes& attributes)
    : shape_(read_shape(attributes)),
      epilogue_(Epilogue(attributes.integer("epilogue", kPlain, kSoftcap))),
      softcap_(epilogue_ == kSoftcap ? attributes.number("softcap") : 0.0f) {
    require(epilogue_ != kGeluGlu || shape_.num_rows % 2 == 0, "gate and up differ in size");
    require(epilogue_ != kSoftcap || softcap_ > 0.0f, "softcap must be above 0");
}

void QuantizedMatMul::compute(const Context& context) const {
    const Tensor x = context.input(0), weights = context.input(1);
    require(x.rank >= 1 && x.last() == shape_.width, "x has another width than K");
    check_weights(weights, shape_);
    const int64_t num_rows = x.num_rows(), num_columns = epilogue_ == kGeluGlu ? shape_.num_rows / 2 : shape_.num_rows;
    require(num_rows * std::max<int64_t>(num_columns, shape_.width) <= kMaxActivations, "x has too many rows");
    const float* other = nullptr;
    if (epilogue_ == kGeluMultiply) {
        const Tensor factor = context.input(2);
        require(factor.data && factor.last() == num_columns && factor.num_rows() == num_rows,
                "other has not the shape of the product");
        other = factor.floats();
    }
    Tensor shape = x;
    shape.dims[x.rank - 1] = num_columns;
    float* y = static_cast<float*>(context.output(0, shape.dims, shape.rank));
    if (num_rows == 0 || !y) return;

    const Kernels& kernels = edge::kernels();
    QuantizedRows rows(x.floats(), int(num_rows), shape_, kernels, activation_scratch());
    const int columns = int(num_columns);
    Claims claims((columns + kPanelRows - 1) / kPanelRows);

    const auto finish = [&](int tile, int column, float* product, float* up) {
        const int count = std::min(kPanelRows, columns - column);
        for (int i = 0; i < rows.rows_of(tile); i++) {
            const size_t place = size_t(rows.first_row(tile) + i) * size_t(columns) + size_t(column);
            const float* from = product + i * kPanelRows;
            if (epilogue_ == kPlain) std::memcpy(y + place, from, sizeof(float) * size_t(count));
            else if (epilogue_ == kSoftcap) kernels.softcap(from, softcap_, y + place, count);
            else if (epilogue_ == kGeluGlu) kernels.gelu_multiply(from, up + i * kPanelRows, y + place, count);
            else kernels.gelu_multiply(from, other + place, y + place, count);
        }
    };
    // Panels of gate and up lie far apart: with one tile, several of one are read before several of the other, so that
    // memory sees long streams. With more tiles a panel is read once and stays in the cache for all of them.
    const int panels_at_once = rows.num_tiles() == 1 ? kPanelsAtOnce : 1;
    const auto multiply_panels = [&](int first, int last, int offset, int tile, float* y) {
        for (int panel = first; panel < last; panel++, y += kMaxTileRows * kPanelRows)
            multiply_rows(kernels, weights.bytes(), shape_, offset + panel * kPanelRows, rows.tile(tile),
                          rows.rows_of(tile), y);
    };
    auto work = [&] {
        rows.quantize();
        constexpr int kTile = kMaxTileRows * kPanelRows;
        alignas(64) float product[kPanelsAtOnce * kTile], up[kPanelsAtOnce * kTile];
        for (int claimed, claimed_end; claims.next(claimed, claimed_end);) {
            for (int first = claimed; first < claimed_end; first += panels_at_once) {
                const int last = std::min(first + panels_at_once, claimed_end);
                for (int tile = 0; tile < rows.num_tiles(); tile++) {
                    multiply_panels(first, last, 0, tile, product);
                    if (epilogue_ == kGeluGlu) multiply_panels(first, last, columns, tile, up);
                    for (int panel = first; panel < last; panel++)
                        finish(tile, panel * kPanelRows, product + (panel - first) * kTile, up + (panel - first) * kTile);
                }
            }
        }
    };
    if (rows.is_small()) rows.quantize();
    if (shape_.bytes() * size_t(rows.num_tiles()) <= kInlineWeightBytes) work();
    else context.run_on_all_threads(work);
}

SelectedMatMul::SelectedMatMul(const Attributes& attributes)
    : shape_(read_shape(attributes)), group_size_(attributes.integer("group_size", 1, kMaxSide)) {
    require(shape_.num_rows % group_size_ == 0, "N is no multiple of group_size");
}

void SelectedMatMul::compute(const Context& context) const {
    const Tensor x = context.input(0), weights = context.input(1), groups = context.input(2);
    require(x.size() == shape_.width, "x must be one row of K values");
    check_weights(weights, shape_);
    const int64_t num_groups = groups.size();
    require(num_groups * group_size_ <= kMaxActivations, "too many groups");
    for (int64_t i = 0; i < num_groups; i++)
        require(groups.integers()[i] >= 0 && groups.integers()[i] < shape_.num_rows / group_size_, "a group is not there");
    const int64_t size = num_groups * group_size_;
    float* y = static_cast<float*>(context.output(0, &size, 1));
    if (size == 0 || !y) return;

    const Kernels& kernels = edge::kernels();
    QuantizedRows rows(x.floats(), 1, shape_, kernels, activation_scratch());
    rows.quantize();
    const int pieces_of_a_group = (group_size_ + kPanelRows - 1) / kPanelRows;
    Claims claims(int(num_groups) * pieces_of_a_group);
    auto work = [&] {
        alignas(64) float product[kPanelRows];
        for (int first, last; claims.next(first, last);) {
            for (int piece = first; piece < last; piece++) {
                const int group = piece / pieces_of_a_group, offset = piece % pieces_of_a_group * kPanelRows;
                const int row = int(groups.integers()[group]) * group_size_ + offset;
                multiply_rows(kernels, weights.bytes(), shape_, row, rows.tile(0), 1, product);
                const int count = std::min(kPanelRows, group_size_ - offset);
                std::memcpy(y + group * group_size_ + offset, product, sizeof(float) * size_t(count));
            }
        }
    };
    if (size * shape_.width * shape_.bits / 8 <= int64_t(kInlineWeightBytes)) work();
    else context.run_on_all_threads(work);
}

}  // namespace edge
