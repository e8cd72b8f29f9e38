// The weight gradient of a convolution of NHWC activations, on raw pointers. It is fp32, whatever their dtype (see conv.h).
#pragma once

#include <cstdint>

#include "conv.h"

namespace fastres {

// out[k][tap][c] = sum over output pixels of grad[pixel][k] * x[pixel moved by tap][c]. Fields as in GemmConv.
struct WeightGradient {
  int64_t grid_height, grid_width;
  const void* x;
  int x_dtype;
  int64_t height, width, x_pixel, step_h, step_w, taps;
  const int64_t *tap_h, *tap_w;
  int64_t depth;
  const float* zeros;   // depth of them
  const float* origin;  // subtracted from x, which then has no padding; padded to whole vectors. Null: nothing
  const void* grad;
  int grad_dtype;
  int64_t grad_pixel, channels;
};

struct WeightGradientKernels {
  int64_t panel, tile_rows;
  // Adds output pixels [begin, end), of each tap the panels [first, last) of its depth, to out. scratch: room for
  // (end - begin) * (channels rounded up to tile_rows + panel + channels) floats; table: for (end - begin) pointers.
  void (*run)(const WeightGradient& p, int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch,
              const void** table, float* out);
};

// The same by the adjoint of Winograd's F(4x4, 3x3), for what conv.h's serves. Formulas: conv_winograd_gradient.inl.
struct WinogradGradientKernels {
  int64_t panel, tile_rows;
  // Transform tiles [begin, end) of the group that starts with tile `first` and has `group` tiles: x into v, grad into g.
  void (*transform_input)(const WinogradConv& conv, int64_t first, int64_t group, int64_t begin, int64_t end, float* v);
  void (*transform_gradient)(const WinogradConv& conv, const void* grad, int64_t first, int64_t group, int64_t begin,
                             int64_t end, float* g);
  // Tiles [begin, end) of the group times each other, for one panel of input channels and some rows of tile_rows output
  // channels; added to sums (36 * tile_rows * panel floats a row) or stored there.
  void (*multiply)(const WinogradConv& conv, int64_t group, int64_t begin, int64_t end, int64_t panel,
                   int64_t first_row, int64_t last_row, const float* v, const float* g, bool add, float* sums);
  // From sums to the gradient [out_channels][3][3][in_channels]. Returns whether it is finite.
  bool (*finish)(const WinogradConv& conv, int64_t panel, int64_t first_row, int64_t last_row, const float* sums,
                 float* weight);
};

const WeightGradientKernels& weight_gradient_kernels();
const WinogradGradientKernels& winograd_gradient_kernels();

}  // namespace fastres
