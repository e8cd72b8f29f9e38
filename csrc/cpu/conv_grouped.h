// Convolution in groups of channels, depthwise included, of NHWC fp32 activations, and its weight gradient, on raw pointers.
//
// A pass over the image for each group would read a few bytes of each pixel at a time. Here all groups take a block of pixels in
// turn, while it is in the cache, and a vector of output channels may have channels of several groups (conv_grouped.inl).
#pragma once

#include <cstdint>

#include "conv.h"

namespace fastres {

struct GroupShape {
  int64_t in_channels, out_channels;  // of all groups
  int64_t group_in, group_out;
};

// Some rows of output pixels of one image of a GemmConv, and the rows and columns of x that they read, which may lie outside of
// the image. The conv's x, y and epilogue have the channels of all groups; its depth and channels are those of one group.
struct GroupedBlock {
  const float* image;
  int64_t top, left, rows, columns;  // of x
  int64_t count;                     // of output pixels
  const int64_t* first;   // of an output pixel: the number of the pixel, of rows x columns, where what it reads begins
  const int64_t* tap;     // of a tap: the number of pixels from there
  const int64_t* places;  // of an output pixel in y
};

struct GroupedKernels {
  int64_t panel;
  bool (*serves)(const GroupShape& shape, int64_t taps);
  int64_t (*panels)(const GroupShape& shape);
  int64_t (*floats)(const GroupShape& shape);       // of the packed weight, for each tap and input channel of a group
  int64_t (*copy_floats)(const GroupShape& shape);  // of scratch, for each pixel of x that a block reads
  // One panel: taps (r[t], s[t]) of a weight whose groups lie group_stride apart; the view is that of the first group. Returns
  // whether they are finite. Packed: [panel][tap][group_in][vectors of the panel].
  bool (*pack)(const GroupShape& shape, const WeightView& weight, int64_t group_stride, int64_t taps, const int64_t* r,
               const int64_t* s, int64_t panel, float* packed);
  // The inverse, for a weight [out_channels][tap][group_in].
  void (*unpack)(const GroupShape& shape, int64_t taps, int64_t panel, const float* packed, float* weight);
  // Panels [first, last). scratch: copy_floats for each pixel of x, and 16 more.
  void (*run)(const GroupShape& shape, const GemmConv& conv, const GroupedBlock& block, int64_t first, int64_t last,
              float* scratch);
  // Adds the products of x with the gradient of the block's outputs, at grad[place + channel], to the packed sums. scratch: as
  // above, and `panel` for each output pixel.
  void (*weight_gradient)(const GroupShape& shape, const GemmConv& conv, const float* grad, const GroupedBlock& block,
                          int64_t first, int64_t last, float* scratch, float* sums);
};

const GroupedKernels& grouped_kernels();

}  // namespace fastres
