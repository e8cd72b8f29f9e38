// fastres_cpu::conv_maxpool: the stem of a ResNet in inference, max_pool2d(act(conv(x) + bias)). Of the convolution's output only
// the rows that a few rows of windows need exist at a time, in the cache.
#include <algorithm>
#include <cstring>
#include <memory>

#include "conv_methods.h"

namespace fastres {
namespace {

// Computes rows [first, last) of one image's convolution into y.
void conv_rows(const ForwardGemm& whole, int64_t image, int64_t first, int64_t last, std::vector<const void*>* table,
               float* y) {
  const GemmConvKernels& kernels = gemm_conv_kernels();
  GemmConv conv = whole.conv;
  std::vector<int64_t> tap_h = whole.taps.h;
  for (int64_t& h : tap_h) h += first * conv.step_h;
  conv.tap_h = tap_h.data();
  conv.x = element(conv.x, conv.x_dtype, image * conv.height * conv.width * conv.x_pixel);
  conv.images = 1;
  conv.grid_height = conv.y_height = last - first;
  conv.y = y;
  conv.y_dtype = 0;
  const int64_t pixels = (last - first) * conv.grid_width, panels = divide_up(conv.channels, kernels.panel);
  const int64_t blocks = divide_up(pixels, 32 * kernels.tile_rows);
  const int64_t most = divide_up(pixels, blocks);
  table->resize((conv.taps + 2) * most);
  const Scratch scratch(gemm_scratch_floats(conv, most, kernels.panel));
  for (int64_t i = 0; i < blocks; ++i) {
    kernels.run(conv, i * pixels / blocks, (i + 1) * pixels / blocks, 0, panels, table->data(), scratch.data());
  }
}

struct Windows {
  int64_t kernel, stride, padding;
  int64_t height, width;  // of the output
};

// Pools what convolve(image, first, last, y) makes: rows [first, last) of an image. One `convolve` a thread, from source().
template <class Source>
void pooled(const Geometry& g, const Windows& windows, int dtype, void* out, const Source& source) {
  const MaxPool pool{g.out_width, g.out_channels, windows.kernel, windows.stride, windows.padding, windows.width};
  const MaxPoolRow pool_row = max_pool_row_kernel(dtype);
  constexpr int64_t kStep = 2;  // rows of windows at a time
  const int64_t row = g.out_width * g.out_channels, capacity = windows.kernel + (kStep - 1) * windows.stride;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(divide_up(4 * threads, g.images), windows.height);  // of an image
  share_tasks(g.images * parts, [&](const auto& take) {
    const Scratch rows(capacity * row);
    auto convolve = source();
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t image = task / parts, part = task % parts, stop = (part + 1) * windows.height / parts;
      int64_t first = 0, last = 0;  // rows of the convolution that there are
      for (int64_t h = part * windows.height / parts; h < stop; h += kStep) {
        const int64_t steps = std::min(kStep, stop - h);
        const int64_t low = std::max<int64_t>(0, h * windows.stride - windows.padding);
        const int64_t high =
            std::min(g.out_height, (h + steps - 1) * windows.stride - windows.padding + windows.kernel);
        const int64_t kept = std::max<int64_t>(0, last - low);
        if (kept > 0) std::memmove(rows.data(), rows.data() + (low - first) * row, kept * row * sizeof(float));
        if (high > low + kept) convolve(image, low + kept, high, rows.data() + kept * row);
        first = low;
        last = high;
        for (int64_t i = h; i < h + steps; ++i) {
          const int64_t top = std::max<int64_t>(0, i * windows.stride - windows.padding);
          const int64_t bottom = std::min(g.out_height, i * windows.stride - windows.padding + windows.kernel);
          pool_row(pool, rows.data() + (top - first) * row, bottom - top,
                   element(out, dtype, (image * windows.height + i) * windows.width * g.out_channels));
        }
      }
    }
  });
}

Tensor conv_maxpool(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& weight,
                    const OptionalTensor& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation, bool relu, int64_t method, int64_t kernel,
                    int64_t pool_stride, int64_t pool_padding) {
  const Activation x_data = nhwc(x, "x");
  const Geometry g({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, 1);
  STD_TORCH_CHECK(method == kGemm || (method == kStem && stem_fits(g)), "this method does not pool");
  const int64_t direct = gemm_floats(forward_taps(g), g.in_channels, g.out_channels);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous() &&
                      packed.numel() == direct + (method == kStem ? stem_floats(g) : 0),
                  "packed weight does not fit");
  STD_TORCH_CHECK(kernel > 0 && pool_stride > 0 && pool_padding >= 0 && pool_padding <= kernel / 2,
                  "unsupported pooling window");
  const int64_t room_h = g.out_height + 2 * pool_padding - kernel, room_w = g.out_width + 2 * pool_padding - kernel;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "the output would be empty");
  const Windows windows{kernel, pool_stride, pool_padding, room_h / pool_stride + 1, room_w / pool_stride + 1};
  Tensor y = cached_empty(g.images, g.out_channels, windows.height, windows.width, x.scalar_type(), true);
  if (y.numel() == 0) return y;
  std::vector<float> bias_data;
  if (bias.has_value()) bias_data = padded_bias(floats(bias, g.out_channels, "bias"), g.out_channels);
  const Epilogue epilogue{bias.has_value() ? bias_data.data() : nullptr, nullptr, relu};
  const float* weights = static_cast<const float*>(packed.const_data_ptr());
  void* out = y.mutable_data_ptr();
  if (method == kStem) {
    std::atomic<bool> finite{true};
    pooled(g, windows, x_data.dtype, out, [&] {
      return [&, rows = std::make_unique<StemRows>(g, x_data, weights + direct, epilogue)](int64_t image, int64_t first,
                                                                                           int64_t last, float* to) {
        if (!rows->run(image, first, last, to)) finite = false;
      };
    });
    if (finite) return y;
  }
  const ForwardGemm whole(g, x_data, weights, epilogue, nullptr);
  pooled(g, windows, x_data.dtype, out, [&] {
    return [&, table = std::vector<const void*>()](int64_t image, int64_t first, int64_t last, float* to) mutable {
      conv_rows(whole, image, first, last, &table, to);
    };
  });
  return y;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "conv_maxpool(Tensor x, Tensor packed, int[] weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "bool relu, int method, int kernel, int pool_stride, int pool_padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("conv_maxpool", TORCH_BOX(&fastres::conv_maxpool)); }
