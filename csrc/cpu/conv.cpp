// fastres_cpu::conv: convolutions of NHWC fp32 activations by the methods of conv.h, and which one serves a shape.
#include "conv.h"

#include <algorithm>
#include <cstring>

#include "conv_methods.h"

namespace fastres {

Taps forward_taps(const Geometry& g) {
  Taps taps;
  taps.pixels = g.rows_as_taps() ? g.kernel_w : 1;
  for (int64_t r = 0; r < g.kernel_h; ++r) {
    for (int64_t s = 0; s < g.kernel_w; s += taps.pixels) {
      const bool padded = g.rows_as_taps();
      taps.add(r, s, r * g.dilation_h - (padded ? 0 : g.pad_h), s * g.dilation_w - (padded ? 0 : g.pad_w));
    }
  }
  return taps;
}

namespace {

// pack(i) for every panel, on all threads. Returns whether all are finite.
template <class F>
bool pack_panels(int64_t channels, int64_t panel, const F& pack) {
  std::vector<char> finite(divide_up(channels, panel));
  torch::stable::parallel_for(0, static_cast<int64_t>(finite.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) finite[i] = pack(i);
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

}  // namespace

bool pack_gemm(const WeightView& view, const Taps& taps, float* packed) {
  const GemmConvKernels& kernels = gemm_conv_kernels();
  return pack_panels(view.out_channels, kernels.panel, [&](int64_t i) {
    return kernels.pack(view, taps.count(), taps.r.data(), taps.s.data(), taps.pixels, i, packed);
  });
}

bool pack_winograd(const WeightView& view, float* packed) {
  const WinogradKernels& kernels = winograd_kernels();
  return pack_panels(view.out_channels, kernels.panel, [&](int64_t i) { return kernels.pack(view, i, packed); });
}

// Cuts the work into blocks of pixels, and into ranges of panels where there are few pixels; each is one call of run.
void run_gemm(const GemmConv& conv) {
  const GemmConvKernels& kernels = gemm_conv_kernels();
  constexpr int64_t kCacheFloats = 1 << 16;  // 256 KB: half of a small L2, for the input of a block
  const int64_t pixels = conv.images * conv.grid_height * conv.grid_width, rows = kernels.tile_rows;
  if (pixels == 0) return;
  const int64_t panels = divide_up(conv.channels, kernels.panel), threads = torch::stable::get_num_threads();
  const int64_t block = std::clamp<int64_t>(kCacheFloats / std::max<int64_t>(conv.depth, 1), 4 * rows, 32 * rows);
  int64_t blocks = divide_up(pixels, block), parts = 1;
  if (conv.taps * conv.channels > 2 * pixels || blocks < threads) {
    parts = std::min(panels, threads);  // more weights than input: each thread reads its part of them
  } else {
    blocks = divide_up(blocks, threads) * threads;  // the same number for each thread
  }
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<const void*> table((conv.taps + 1) * divide_up(pixels, blocks));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % blocks, part = task / blocks;
      kernels.run(conv, i * pixels / blocks, (i + 1) * pixels / blocks, part * panels / parts,
                  (part + 1) * panels / parts, table.data());
    }
  });
}

// x with zeros around it: [images, height + 2 pad_h, width + 2 pad_w, channels].
void pad(const Geometry& g, const float* x, float* out) {
  const int64_t height = g.height + 2 * g.pad_h, row = (g.width + 2 * g.pad_w) * g.in_channels,
                edge = g.pad_w * g.in_channels;
  torch::stable::parallel_for(0, g.images * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = out + i * row;
      const int64_t h = i % height - g.pad_h;
      if (h < 0 || h >= g.height) {
        std::fill(to, to + row, 0.0f);
        continue;
      }
      std::fill(to, to + edge, 0.0f);
      const float* from = x + (i / height * g.height + h) * g.width * g.in_channels;
      std::memcpy(to + edge, from, g.width * g.in_channels * sizeof(float));
      std::fill(to + row - edge, to + row, 0.0f);
    }
  });
}

void conv_gemm(const Geometry& g, const float* x, const float* packed, const Epilogue& epilogue, float* y) {
  const Taps taps = forward_taps(g);
  const bool padded = g.rows_as_taps();
  const Scratch copy(padded ? g.images * (g.height + 2 * g.pad_h) * (g.width + 2 * g.pad_w) * g.in_channels : 1);
  if (padded) pad(g, x, copy.data());
  const int64_t depth = taps.pixels * g.group_in();
  const std::vector<float> zeros(depth);
  GemmConv conv{};
  conv.images = g.images;
  conv.grid_height = conv.y_height = g.out_height;
  conv.grid_width = conv.y_width = g.out_width;
  conv.height = padded ? g.height + 2 * g.pad_h : g.height;
  conv.width = padded ? g.width + 2 * g.pad_w : g.width;
  conv.x_pixel = g.in_channels;
  conv.step_h = g.stride_h;
  conv.step_w = g.stride_w;
  conv.taps = taps.count();
  conv.tap_h = taps.h.data();
  conv.tap_w = taps.w.data();
  conv.depth = depth;
  conv.zeros = zeros.data();
  conv.y_pixel = g.out_channels;
  conv.y_step_h = conv.y_step_w = 1;
  conv.channels = g.group_out();
  const int64_t floats = gemm_floats(taps, g.group_in(), g.group_out());
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t out = group * g.group_out();
    conv.x = (padded ? copy.data() : x) + group * g.group_in();
    conv.y = y + out;
    conv.weight = packed + group * floats;
    std::vector<float> bias;
    if (epilogue.bias) {
      bias.assign(epilogue.bias + out, epilogue.bias + out + g.group_out());
      bias.resize(padded_channels(g.group_out()));
    }
    conv.epilogue = {epilogue.bias ? bias.data() : nullptr, epilogue.residual ? epilogue.residual + out : nullptr,
                     epilogue.relu};
    run_gemm(conv);
  }
}

namespace {

bool winograd_fits(const Geometry& g) {
  const int64_t lanes = winograd_kernels().lanes;
  return g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 &&
         g.dilation_w == 1 && g.groups == 1 && g.in_channels % lanes == 0 && g.out_channels % lanes == 0;
}

// Into how many groups the tiles are cut: a group has enough of them to use a panel of weights often, and few enough for their
// transforms to stay in the cache.
int64_t winograd_groups(const WinogradConv& conv, int64_t threads) {
  const int64_t rows = winograd_kernels().tile_rows;
  const int64_t cached = (1 << 16) / (36 * conv.in_channels);
  const int64_t group = std::clamp<int64_t>(cached, 4 * rows, 8 * rows);
  return divide_up(divide_up(conv.tiles(), group), threads) * threads;
}

// Returns whether all outputs are finite before the epilogue. If not, an infinity or NaN of x may have reached outputs of its
// tile that it has no part in, and the caller has to compute them the direct way.
bool run_winograd(const WinogradConv& conv) {
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t threads = torch::stable::get_num_threads(), tiles = conv.tiles();
  const int64_t groups = winograd_groups(conv, threads), group = divide_up(tiles, groups);
  const int64_t panels = divide_up(conv.out_channels, kernels.panel);
  const int64_t v_floats = 36 * winograd_plane(group, conv.in_channels);
  const int64_t m_floats = 36 * winograd_plane(group, kernels.panel);
  std::vector<char> finite(std::max(groups, panels) + 1, 1);
  if (tiles > 12 * threads) {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(v_floats + m_floats);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * tiles / groups, count = (i + 1) * tiles / groups - first;
        kernels.transform(conv, first, count, 0, count, scratch.data());
        finite[i] = kernels.multiply(conv, first, count, 0, panels, scratch.data(), scratch.data() + v_floats);
      }
    });
  } else {  // few tiles: the threads share them and divide the weights, which then are read only once
    const Scratch v(36 * winograd_plane(tiles, conv.in_channels));
    torch::stable::parallel_for(
        0, tiles, 1, [&](int64_t begin, int64_t end) { kernels.transform(conv, 0, tiles, begin, end, v.data()); });
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch m(36 * winograd_plane(tiles, kernels.panel));
      finite[begin] = kernels.multiply(conv, 0, tiles, begin, end, v.data(), m.data());
    });
  }
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

// The direct way with the weights of a packed Winograd convolution, which are recovered to fp32 rounding.
void conv_without_winograd(const Geometry& g, const WinogradConv& conv) {
  const WinogradKernels& kernels = winograd_kernels();
  const Scratch plain(9 * g.in_channels * g.out_channels);
  for (int64_t i = 0; i < divide_up(g.out_channels, kernels.panel); ++i) kernels.unpack(conv, i, plain.data());
  const Taps taps = forward_taps(g);
  const Scratch packed(gemm_floats(taps, g.in_channels, g.out_channels));
  const int64_t c = g.in_channels;
  pack_gemm({plain.data(), g.out_channels, c, 3, 3, 9 * c, 1, 3 * c, c}, taps, packed.data());
  conv_gemm(g, conv.x, packed.data(), conv.epilogue, conv.y);
}

}  // namespace

WinogradConv winograd_of(const Geometry& g, const float* x, const float* packed, const Epilogue& epilogue, float* y) {
  return {g.images, g.height, g.width, g.in_channels, g.out_height, g.out_width, g.out_channels, g.pad_h, g.pad_w,
          x,        packed,   y,       epilogue};
}

void conv_winograd(const Geometry& g, const float* x, const float* packed, const Epilogue& epilogue, float* y) {
  const WinogradConv conv = winograd_of(g, x, packed, epilogue, y);
  if (!run_winograd(conv)) conv_without_winograd(g, conv);
}

const float* nhwc(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  check_dense(t, true, name);
  return static_cast<const float*>(t.const_data_ptr());
}

Method method_of(const Geometry& g, bool winograd) {
  if (g.groups > 1) return kNone;
  if (!winograd || !winograd_fits(g)) return kGemm;
  // A tile costs 36 products whether its 16 outputs are used or not, and half as much again for the transforms.
  const int64_t tiles = divide_up(g.out_height, 4) * divide_up(g.out_width, 4);
  return 36 * tiles * 3 < 9 * g.out_height * g.out_width * 2 ? kWinograd : kGemm;
}

namespace {

int64_t conv_method(const std::vector<int64_t>& x, const std::vector<int64_t>& weight,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation, int64_t groups, bool winograd) {
  const Geometry g(x, weight, stride, padding, dilation, groups);
  return method_of(g, winograd);
}

Tensor conv_pack(const Tensor& weight, const std::vector<int64_t>& x, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                 int64_t method) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, "weight must be a 4D float32 tensor");
  const Geometry g(x, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, stride, padding, dilation,
                   groups);
  STD_TORCH_CHECK(method == kGemm || method == kWinograd, "method must be 1 or 2");
  if (method == kWinograd) {
    STD_TORCH_CHECK(winograd_fits(g), "Winograd does not serve this convolution");
    Tensor packed = cached_empty(winograd_floats(g));
    const bool finite = pack_winograd(view_of(weight, 0, 1), static_cast<float*>(packed.mutable_data_ptr()));
    return finite ? packed : cached_empty(0);
  }
  const Taps taps = forward_taps(g);
  const int64_t floats = gemm_floats(taps, g.group_in(), g.group_out());
  Tensor packed = cached_empty(groups * floats);
  float* out = static_cast<float*>(packed.mutable_data_ptr());
  for (int64_t group = 0; group < groups; ++group)
    pack_gemm(view_of(weight, group, groups), taps, out + group * floats);
  return packed;
}

Tensor conv(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t groups, bool relu, int64_t method) {
  const float* x_data = nhwc(x, "x");
  const Geometry g({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, groups);
  Tensor y = cached_empty(g.images, g.out_channels, g.out_height, g.out_width, ScalarType::Float, true);
  if (residual.has_value()) check_like(*residual, y, true, "residual");
  std::vector<float> padded_bias;
  if (bias.has_value()) {
    const float* data = floats(bias, g.out_channels, "bias");
    padded_bias.assign(data, data + g.out_channels);
    padded_bias.resize(padded_channels(g.out_channels));
  }
  const Epilogue epilogue{bias.has_value() ? padded_bias.data() : nullptr,
                          residual.has_value() ? nhwc(*residual, "residual") : nullptr, relu};
  float* y_data = static_cast<float*>(y.mutable_data_ptr());
  STD_TORCH_CHECK(method == kGemm || method == kWinograd, "method must be 1 or 2");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous(),
                  "packed weight must be what conv_pack returned");
  const float* weight_data = static_cast<const float*>(packed.const_data_ptr());
  if (g.pixels() == 0) return y;
  if (method == kWinograd) {
    STD_TORCH_CHECK(winograd_fits(g) && packed.numel() == winograd_floats(g), "packed weight does not fit");
    conv_winograd(g, x_data, weight_data, epilogue, y_data);
    return y;
  }
  STD_TORCH_CHECK(packed.numel() == groups * gemm_floats(forward_taps(g), g.group_in(), g.group_out()),
                  "packed weight does not fit");
  conv_gemm(g, x_data, weight_data, epilogue, y_data);
  return y;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "conv_method(int[] x, int[] weight, int[] stride, int[] padding, int[] dilation, int groups, bool winograd) -> int");
  m.def(
      "conv_pack(Tensor weight, int[] x, int[] stride, int[] padding, int[] dilation, int groups, int method) -> Tensor");
  m.def(
      "conv(Tensor x, Tensor packed, int[] weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool relu, int method) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) {
  m.impl("conv_method", TORCH_BOX(&fastres::conv_method));
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&fastres::conv_pack));
  m.impl("conv", TORCH_BOX(&fastres::conv));
}
