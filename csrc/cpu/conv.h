// Convolution of NHWC activations with packed weights, (+ bias) (+ residual) (+ ReLU) in the epilogue, on raw pointers.
//
// Activations are stored as fp32, bf16 or fp16 (dtype 0, 1, 2). All else is fp32: weights, products, sums.
//
// Two methods share one register tile (conv_tile.inl): kTileRows output pixels x some vectors of output channels, one input
// channel after the other. Packed weights lie in panels of `panel` output channels, in the order in which the tile reads them.
#pragma once

#include <cstdint>

namespace fastres {

// Where the values of a weight [K, C, R, S] lie: data[k * stride_k + c * stride_c + r * stride_r + s * stride_s].
// The data gradient reads the same weight with K and C exchanged and the kernel turned by 180 degrees (negative strides).
struct WeightView {
  const float* data;
  int64_t out_channels, in_channels, height, width;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

// What is done with the sums before they are stored. Null: nothing.
struct Epilogue {
  const float* bias;     // padded to whole vectors
  const void* residual;  // like y
  bool relu;
};

// `sums` of a convolution: null, or [3][output channels] for sums over a block of its outputs, as they are stored. p, a point near
// them; sum of y - p; sum of (y - p)^2. Sums of distances to a point of the block's own do not cancel when the mean is large.

// Implicit matrix product: y[pixel] = sum over taps t of x[pixel moved by t] * weight[t].
struct GemmConv {
  // The grid of output pixels that are computed: images x grid_height x grid_width.
  int64_t images, grid_height, grid_width;
  // Output (i, j) reads input (i * step_h + tap_h[t], j * step_w + tap_w[t]), and zeros outside of the image.
  const void* x;
  int x_dtype;
  int64_t height, width, x_pixel;  // x_pixel: values from one pixel to the next
  int64_t step_h, step_w, taps;
  const int64_t *tap_h, *tap_w;
  int64_t depth;       // values a tap reads: the input channels, or several pixels at once
  const float* zeros;  // depth of them
  // Output (i, j) is y pixel (i * y_step_h + y_first_h, j * y_step_w + y_first_w).
  void* y;
  int y_dtype;
  int64_t y_height, y_width, y_pixel, y_step_h, y_step_w, y_first_h, y_first_w;
  int64_t channels;     // output channels
  const float* weight;  // packed: [panel][tap][depth][columns of the panel]
  Epilogue epilogue;
  float* sums = nullptr;  // of the outputs of a call of run
};

struct GemmConvKernels {
  int64_t panel, tile_rows;
  // One panel: of each tap (r[t], s[t]) the values of `pixels` kernel places next to each other, all input channels of each.
  // Returns whether they are finite.
  bool (*pack)(const WeightView& weight, int64_t taps, const int64_t* r, const int64_t* s, int64_t pixels,
               int64_t index, float* packed);
  // Output pixels [begin, end), panels [first, last); table: room for (taps + 2) * (end - begin) pointers, scratch: for
  // gemm_scratch_floats.
  void (*run)(const GemmConv& conv, int64_t begin, int64_t end, int64_t first, int64_t last, const void** table,
              float* scratch);
};
// So many products are added to one another before they are added to the rest: the error of one long sum of values that have a mean
// grows with its length. oneDNN sums in blocks as well.
constexpr int64_t kSummed = 256;
inline bool gemm_in_blocks(const GemmConv& conv) { return conv.taps * conv.depth > kSummed; }
// The fp32 copies of what `pixels` pixels read, and the sums of a panel for them that are not what is stored.
inline int64_t gemm_scratch_floats(const GemmConv& conv, int64_t pixels, int64_t panel) {
  return pixels *
         ((conv.x_dtype != 0 ? conv.taps * conv.depth : 0) + (conv.y_dtype != 0 || gemm_in_blocks(conv) ? panel : 0));
}

// Winograd's F(MxM, 3x3) with M = 4 or 2: 36 products a channel for 16 outputs or 16 for 4, which take 144 and 36 the direct way.
// Stride 1, dilation 1, one group, channels a multiple of the vector width. Lavin and Gray 2016 (arXiv 1509.09308).
struct WinogradConv {
  int64_t tile;  // M
  int64_t images, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t pad_h, pad_w;
  int dtype;  // of x and y
  const void* x;
  const float* weight;  // packed: [panel][(M + 2)^2][in_channels][columns of the panel], in planes of winograd_plane
  void* y;
  Epilogue epilogue;
  float* sums = nullptr;  // of the outputs of a group of tiles
  int64_t tile_rows() const { return (out_height + tile - 1) / tile; }
  int64_t tile_columns() const { return (out_width + tile - 1) / tile; }
  int64_t positions() const { return (tile + 2) * (tile + 2); }  // of a transformed tile
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
  // Output pixels of the first `count` tiles.
  int64_t pixels_of(int64_t count) const {
    const int64_t plane = tile_rows() * tile_columns(), rest = count % plane, row = rest / tile_columns();
    const int64_t top = row * tile, rows = top + tile < out_height ? tile : out_height - top;
    return (count / plane * out_height + top) * out_width + rest % tile_columns() * tile * rows;
  }
};

struct WinogradKernels {
  int64_t panel, tile_rows, lanes;
  // One panel of the transformed weight, computed in float64. Returns whether it is finite.
  bool (*pack)(const WeightView& weight, int64_t index, float* packed);
  // The inverse, to fp32 rounding: weight [out_channels][3][3][in_channels] of one panel.
  void (*unpack)(const WinogradConv& conv, int64_t index, float* weight);
  // Transforms tiles [begin, end) of the group that starts with tile `first` and has `group` tiles into v.
  void (*transform)(const WinogradConv& conv, int64_t first, int64_t group, int64_t begin, int64_t end, float* v);
  // Products with panels [first_panel, last_panel) and the inverse transform for the group's tiles, `together` panels at a time;
  // m: scratch for so many. Returns whether all outputs are finite.
  bool (*multiply)(const WinogradConv& conv, int64_t first, int64_t group, int64_t first_panel, int64_t last_panel,
                   int64_t together, const float* v, float* m);
};
// Floats of the plane of one position, of rows x columns. The odd line keeps the planes out of one another's cache sets.
inline int64_t winograd_plane(int64_t rows, int64_t columns) { return rows * columns + 16; }

// The stem of a ResNet: kernels of any height and 7 pixels width, stride 2 along the rows, few input channels. Winograd along the
// rows only: 4 outputs take 13 products for each channel and row of the kernel instead of 28.
struct StemConv {
  int64_t taps, in_channels, out_channels;  // taps: height of the kernel
  int64_t out_width, tiles;                 // tiles: of 4 outputs in a row
  const float* weight;                      // packed: [panel][point][tap][depth][columns of the panel]
  const float* bias;                        // padded to whole vectors; null: none
  bool relu;
};
constexpr int64_t kStemValues = 13;  // transformed values of a channel and a tile
// Floats of the packed weight for an output channel.
inline int64_t stem_weights(const StemConv& conv) { return kStemValues * conv.taps * conv.in_channels; }
// Values of one channel and point of a row, of all tiles.
inline int64_t stem_line(int64_t tiles, int64_t lanes) { return (tiles / lanes + 2) * lanes; }

struct StemKernels {
  int64_t panel, lanes;
  // One panel of the transformed weight, computed in float64. Returns whether it is finite.
  bool (*pack)(const StemConv& conv, const WeightView& weight, int64_t index, float* packed);
  // row: 8 * (tiles + 1) pixels; out: kStemValues lines a channel; planes: scratch for 8.
  void (*transform)(const StemConv& conv, const float* row, float* planes, float* out);
  // One row of outputs from `taps` transformed rows; m: room for 7 * tiles * panel. Returns whether all are finite.
  bool (*row)(const StemConv& conv, const float* const* rows, float* m, float* y);
  // What one row of the outputs' gradient adds to the sums of the weight's, which lie as the packed weight.
  void (*gradient)(const StemConv& conv, const float* const* rows, const float* grad, float* m, float* sums);
  // One panel of the gradient [out_channels][taps][7][in_channels] from `parts` such sums. Returns whether it is finite.
  bool (*finish)(const StemConv& conv, int64_t index, const float* const* sums, int64_t parts, float* weight);
};

struct MaxPool {
  int64_t width, channels;  // of a row of x
  int64_t kernel, stride, padding;
  int64_t out_width;
};
// One row of windows; x: the `rows` rows of pixels that they cover; y in the dtype of the kernel.
using MaxPoolRow = void (*)(const MaxPool& pool, const float* x, int64_t rows, void* y);
// `count` values that lie next to each other, to fp32.
using ToFloat = void (*)(const void* values, int64_t count, float* out);

MaxPoolRow max_pool_row_kernel(int dtype);
ToFloat to_float_kernel(int dtype);
const GemmConvKernels& gemm_conv_kernels();
const WinogradKernels& winograd_kernels(int64_t tile);
const StemKernels& stem_kernels();

}  // namespace fastres
