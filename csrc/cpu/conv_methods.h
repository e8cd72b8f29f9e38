// What the convolution ops share: the geometry of a convolution, its taps, and the methods of conv.h over all threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "buffers.h"
#include "common.h"
#include "conv.h"
#include "conv_grouped.h"
#include "conv_statistics.h"
#include "storage.h"

namespace fastres {

enum Method : int64_t { kNone = 0, kGemm = 1, kWinograd4 = 2, kWinograd2 = 3, kGrouped = 4, kStem = 5 };
// Outputs a side of a tile of F(4x4, 3x3) and F(2x2, 3x3); 0 for other methods.
inline int64_t winograd_tile(int64_t method) { return method == kWinograd4 ? 4 : method == kWinograd2 ? 2 : 0; }

// worker(take) on every thread, where take() gives each of `count` tasks to one of them, and -1 when there are none left. So a
// thread whose processor is slowed down by others does less, instead of letting the rest wait.
template <class Worker>
void share_tasks(int64_t count, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    worker([&] {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      return task < count ? task : -1;
    });
  });
}

struct Geometry {
  int64_t images, in_channels, height, width;  // of x
  int64_t out_channels, kernel_h, kernel_w;    // of the weight
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t out_height, out_width;

  Geometry(const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups_) {
    STD_TORCH_CHECK(
        x.size() == 4 && weight.size() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "expected sizes of 4 dimensions and pairs of numbers");
    images = x[0], in_channels = x[1], height = x[2], width = x[3];
    out_channels = weight[0], kernel_h = weight[2], kernel_w = weight[3];
    stride_h = stride[0], stride_w = stride[1], pad_h = padding[0], pad_w = padding[1];
    dilation_h = dilation[0], dilation_w = dilation[1], groups = groups_;
    STD_TORCH_CHECK(
        groups > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0 && pad_h >= 0 && pad_w >= 0,
        "unsupported convolution");
    STD_TORCH_CHECK(in_channels > 0 && out_channels > 0 && kernel_h > 0 && kernel_w > 0, "empty weight");
    STD_TORCH_CHECK(weight[1] * groups == in_channels && out_channels % groups == 0, "channels do not match");
    const int64_t room_h = height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1;
    const int64_t room_w = width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1;
    STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "the output would be empty");
    out_height = room_h / stride_h + 1;
    out_width = room_w / stride_w + 1;
  }
  int64_t pixels() const { return images * out_height * out_width; }
  int64_t padded_height() const { return height + 2 * pad_h; }
  int64_t padded_rows() const { return images * padded_height(); }
  int64_t padded_floats() const { return padded_rows() * (width + 2 * pad_w) * in_channels; }
  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  // Few input channels: a tap is a row of the kernel, whose pixels lie next to each other in a padded copy of x.
  bool rows_as_taps() const { return groups == 1 && in_channels < 16 && kernel_w > 1 && dilation_w == 1; }
};

// The taps of a GEMM convolution: places in the kernel, and where the first output pixel finds them.
struct Taps {
  std::vector<int64_t> r, s, h, w;
  int64_t pixels = 1;  // kernel places a tap covers
  int64_t count() const { return static_cast<int64_t>(r.size()); }
  void add(int64_t r_, int64_t s_, int64_t h_, int64_t w_) {
    r.push_back(r_);
    s.push_back(s_);
    h.push_back(h_);
    w.push_back(w_);
  }
};

Taps forward_taps(const Geometry& g);

inline int64_t padded_channels(int64_t channels) { return divide_up(channels, 16) * 16; }
inline int64_t gemm_floats(const Taps& taps, int64_t in_channels, int64_t out_channels) {
  return taps.count() * taps.pixels * in_channels * padded_channels(out_channels);
}
inline int64_t winograd_floats(const Geometry& g, int64_t tile) {
  const int64_t panel = winograd_kernels(tile).panel;
  return divide_up(g.out_channels, panel) * (tile + 2) * (tile + 2) * winograd_plane(g.in_channels, panel);
}

// The weights of one group of a convolution.
inline WeightView view_of(const Tensor& weight, int64_t group, int64_t groups) {
  const int64_t k = weight.size(0) / groups;
  return {static_cast<const float*>(weight.const_data_ptr()) + group * k * weight.stride(0),
          k,
          weight.size(1),
          weight.size(2),
          weight.size(3),
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3)};
}

// The bias of an epilogue: padded, because whole vectors of it are read.
inline std::vector<float> padded_bias(const float* bias, int64_t channels) {
  std::vector<float> padded(bias, bias + channels);
  padded.resize(padded_channels(channels));
  return padded;
}

// The data of an activation; check that t is dense NHWC of a dtype that is served.
struct Activation {
  const void* data;
  int dtype;
};
Activation nhwc(const Tensor& t, const char* name);
inline const float* fp32(const Activation& activation) {
  STD_TORCH_CHECK(activation.dtype == 0, "expected a float32 activation");
  return static_cast<const float*>(activation.data);
}

inline void check_gradient(const Tensor& grad_y, const Geometry& g) {
  STD_TORCH_CHECK(grad_y.size(0) == g.images && grad_y.size(1) == g.out_channels && grad_y.size(2) == g.out_height &&
                      grad_y.size(3) == g.out_width,
                  "grad_y must have the shape of the output");
}

// y and the epilogue's residual have the dtype of x.
WinogradConv winograd_of(const Geometry& g, int64_t tile, const Activation& x, const float* packed,
                         const Epilogue& epilogue, void* y);
Method method_of(const Geometry& g, bool winograd);
bool winograd_fits(const Geometry& g);
// Both return whether all packed values are finite.
bool pack_gemm(const WeightView& view, const Taps& taps, float* packed);
bool pack_winograd(const WeightView& view, int64_t tile, float* packed);
// x in fp32 with zeros around it: [images, height + 2 pad_h, width + 2 pad_w, channels]; some of its rows, or all.
void pad_rows(const Geometry& g, const Activation& x, float* out, int64_t begin, int64_t end);
void pad(const Geometry& g, const Activation& x, float* out);

// The first group of a convolution as a matrix product that writes to y, with what it points to.
struct ForwardGemm {
  Taps taps;
  Scratch copy;  // x with its padding, where rows are taps
  std::vector<float> zeros;
  GemmConv conv{};
  ForwardGemm(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, void* y);
};

// All pixels and panels, on all threads; then(begin, end) when these pixels are there. sums: of y, or null.
void run_gemm(const GemmConv& conv, const std::function<void(int64_t, int64_t)>& then = {}, BlockSums* sums = nullptr);
void conv_gemm(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, void* y);
// With the direct way behind it where x has an infinity or NaN. sums: of y, or null; left empty if the direct way was taken.
void conv_winograd(const Geometry& g, int64_t tile, const Activation& x, const float* packed, const Epilogue& epilogue,
                   void* y, BlockSums* sums = nullptr);
// By any method, with checks. sums: of the output, or null; left empty where the method has none.
Tensor convolve(const Tensor& x, const Tensor& packed, const Geometry& g, const OptionalTensor& bias,
                const OptionalTensor& residual, bool relu, int64_t method, BlockSums* sums);

// out[k][tap][c] = sum over pixels of grad[pixel][k] * (x[pixel moved by tap][c] - origin[c]). origin: null for zeros, else padded to
// whole vectors, and only for convolutions without padding.
void weight_gradient(const Geometry& g, const Activation& grad, const Activation& x, const float* origin, float* out);

// The method kStem. Its packed weight is that of the direct way (gemm_floats), then stem_floats more.
bool stem_fits(const Geometry& g);
int64_t stem_floats(const Geometry& g);
bool pack_stem(const Geometry& g, const WeightView& view, float* packed);
// Rows of outputs of one thread, which keeps the transformed rows of x that the next ones need.
class StemRows {
 public:
  StemRows(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue);
  // Rows [first, last) of an image to y, in fp32. Returns whether they are finite before the bias.
  bool run(int64_t image, int64_t first, int64_t last, float* y);
  // Adds what rows [first, last) of an image give to sums of the weight's gradient.
  void add_gradient(int64_t image, int64_t first, int64_t last, const Activation& grad, float* sums);

 private:
  void rows_of(int64_t image, int64_t h);
  const float* transformed(int64_t image, int64_t padded_row);

  const Geometry& g_;
  Activation x_;
  const StemKernels& kernels_;
  StemConv conv_;
  ToFloat to_float_;
  int64_t line_, pixels_;  // floats of one point of all channels; pixels of a row with its zeros
  Scratch row_, planes_, ring_, sums_;
  std::vector<int64_t> held_;       // the row in each place of the ring
  std::vector<const float*> rows_;  // of an output row
};
// Returns whether all outputs are finite; if not, the direct way has to compute them.
bool conv_stem(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, float* y);
// out[k][r][s][c]; returns whether it is finite.
bool stem_weight_gradient(const Geometry& g, const Activation& grad, const Activation& x, float* out);

GroupShape group_shape(const Geometry& g);
int64_t grouped_floats(const GroupShape& shape, const Taps& taps);  // of the packed weight
// As pack_gemm, of a weight whose groups lie group_stride apart; the view is that of the first.
bool pack_grouped(const GroupShape& shape, const WeightView& view, int64_t group_stride, const Taps& taps,
                  float* packed);
// Convolutions of one x, block after block of it.
void run_grouped(const GroupShape& shape, const std::vector<GemmConv>& convs);
void conv_grouped(const Geometry& g, const float* x, const float* packed, const Epilogue& epilogue, float* y);
void grouped_weight_gradient(const Geometry& g, const float* grad, const float* x, float* out);

}  // namespace fastres
