// fastres_cpu::conv: convolutions of NHWC activations by the methods of conv.h, and which one serves a shape.
#include "conv.h"

#include <algorithm>
#include <bit>
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

bool pack_winograd(const WeightView& view, int64_t tile, float* packed) {
  const WinogradKernels& kernels = winograd_kernels(tile);
  return pack_panels(view.out_channels, kernels.panel, [&](int64_t i) { return kernels.pack(view, i, packed); });
}

namespace {

// As many blocks of work for 1, 2, 4 or 8 threads: sums over them must not depend on the number of threads.
int64_t even_blocks(int64_t blocks) {
  const int64_t step = std::min<int64_t>(std::bit_floor(static_cast<uint64_t>(blocks)), 8);
  return divide_up(blocks, step) * step;
}

}  // namespace

// Cuts the work into blocks of pixels, and into ranges of panels where there are few pixels; each is one call of run.
void run_gemm(const GemmConv& conv, const std::function<void(int64_t, int64_t)>& then, BlockSums* sums) {
  const GemmConvKernels& kernels = gemm_conv_kernels();
  constexpr int64_t kCacheFloats = 1 << 16;  // 256 KB: half of a small L2, for the input of a block
  const int64_t pixels = conv.images * conv.grid_height * conv.grid_width, rows = kernels.tile_rows;
  if (pixels == 0) return;
  const int64_t panels = divide_up(conv.channels, kernels.panel), threads = torch::stable::get_num_threads();
  const int64_t block = std::clamp<int64_t>(kCacheFloats / std::max<int64_t>(conv.depth, 1), 4 * rows, 32 * rows);
  int64_t blocks = divide_up(pixels, block), parts = 1;
  if (sums) blocks = even_blocks(blocks);
  if (conv.taps * conv.channels > 2 * pixels || blocks < threads) {
    parts = std::min(panels, threads);  // more weights than input: each thread reads its part of them
  } else if (!sums) {
    blocks = divide_up(blocks, threads) * threads;  // the same number for each thread
  }
  const auto first_pixel = [&](int64_t i) { return i * pixels / blocks; };
  if (sums) {
    sums->reserve(conv.channels, blocks);
    for (int64_t i = 0; i < blocks; ++i) sums->pixels[i] = first_pixel(i + 1) - first_pixel(i);
  }
  share_tasks(parts > 1 ? parts : blocks, [&](const auto& take) {
    const int64_t most = divide_up(pixels, blocks);  // pixels of a block
    std::vector<const void*> table((conv.taps + 2) * most);
    const Scratch scratch(gemm_scratch_floats(conv, most, kernels.panel));
    GemmConv mine = conv;
    const auto run = [&](int64_t block_index, int64_t part) {
      if (sums) mine.sums = sums->block(block_index);
      kernels.run(mine, first_pixel(block_index), first_pixel(block_index + 1), part * panels / parts,
                  (part + 1) * panels / parts, table.data(), scratch.data());
    };
    for (int64_t task = take(); task >= 0; task = take()) {
      if (parts == 1) {
        run(task, 0);
        if (then) then(first_pixel(task), first_pixel(task + 1));
      } else {
        for (int64_t i = 0; i < blocks; ++i) run(i, task);
      }
    }
  });
  if (then && parts > 1) then(0, pixels);
}

void pad_rows(const Geometry& g, const Activation& x, float* out, int64_t begin, int64_t end) {
  const ToFloat to_float = to_float_kernel(x.dtype);
  const int64_t height = g.height + 2 * g.pad_h, row = (g.width + 2 * g.pad_w) * g.in_channels,
                edge = g.pad_w * g.in_channels;
  for (int64_t i = begin; i < end; ++i) {
    float* to = out + i * row;
    const int64_t h = i % height - g.pad_h;
    if (h < 0 || h >= g.height) {
      std::fill(to, to + row, 0.0f);
      continue;
    }
    std::fill(to, to + edge, 0.0f);
    const int64_t from = (i / height * g.height + h) * g.width * g.in_channels;
    to_float(element(x.data, x.dtype, from), g.width * g.in_channels, to + edge);
    std::fill(to + row - edge, to + row, 0.0f);
  }
}

void pad(const Geometry& g, const Activation& x, float* out) {
  torch::stable::parallel_for(0, g.padded_rows(), 16,
                              [&](int64_t begin, int64_t end) { pad_rows(g, x, out, begin, end); });
}

ForwardGemm::ForwardGemm(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, void* y)
    : taps(forward_taps(g)), copy(g.rows_as_taps() ? g.padded_floats() : 1), zeros(taps.pixels * g.group_in()) {
  const bool padded = g.rows_as_taps();
  if (padded) pad(g, x, copy.data());
  conv.images = g.images;
  conv.grid_height = conv.y_height = g.out_height;
  conv.grid_width = conv.y_width = g.out_width;
  conv.x = padded ? copy.data() : x.data;
  conv.x_dtype = padded ? 0 : x.dtype;
  conv.height = padded ? g.height + 2 * g.pad_h : g.height;
  conv.width = padded ? g.width + 2 * g.pad_w : g.width;
  conv.x_pixel = g.in_channels;
  conv.step_h = g.stride_h;
  conv.step_w = g.stride_w;
  conv.taps = taps.count();
  conv.tap_h = taps.h.data();
  conv.tap_w = taps.w.data();
  conv.depth = taps.pixels * g.group_in();
  conv.zeros = zeros.data();
  conv.y = y;
  conv.y_dtype = x.dtype;
  conv.y_pixel = g.out_channels;
  conv.y_step_h = conv.y_step_w = 1;
  conv.channels = g.group_out();
  conv.weight = packed;
  conv.epilogue = epilogue;
}

void conv_gemm(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, void* y) {
  const ForwardGemm whole(g, x, packed, epilogue, y);
  const int64_t floats = gemm_floats(whole.taps, g.group_in(), g.group_out());
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t out = group * g.group_out();
    GemmConv conv = whole.conv;
    conv.x = element(conv.x, conv.x_dtype, group * g.group_in());
    conv.y = element(conv.y, conv.y_dtype, out);
    conv.weight += group * floats;
    std::vector<float> bias;
    if (epilogue.bias) bias = padded_bias(epilogue.bias + out, g.group_out());
    conv.epilogue = {epilogue.bias ? bias.data() : nullptr,
                     epilogue.residual ? element(epilogue.residual, conv.y_dtype, out) : nullptr, epilogue.relu};
    run_gemm(conv);
  }
}

bool winograd_fits(const Geometry& g) {
  const int64_t lanes = winograd_kernels(4).lanes;
  return g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 &&
         g.dilation_w == 1 && g.groups == 1 && g.in_channels % lanes == 0 && g.out_channels % lanes == 0;
}

namespace {

// Returns whether all outputs are finite before the epilogue. If not, an infinity or NaN of x may have reached outputs of its
// tile that it has no part in, and the caller has to compute them the direct way.
//
// Tiles go in groups whose transforms stay in L2, panel after panel of the weights from products to outputs. Weights too large for
// any cache are read once: by all tiles, position by position, and divided between the threads. So are those of few tiles.
bool run_winograd(const WinogradConv& conv, BlockSums* sums) {
  const WinogradKernels& kernels = winograd_kernels(conv.tile);
  const int64_t threads = torch::stable::get_num_threads(), tiles = conv.tiles(), rows = kernels.tile_rows;
  const int64_t panels = divide_up(conv.out_channels, kernels.panel), positions = conv.positions();
  constexpr int64_t kLargeWeights = 1 << 22, kCachedGroup = 1 << 16, kCachedPosition = 1 << 15;  // floats
  const bool large = positions * conv.in_channels * conv.out_channels > kLargeWeights;
  const int64_t most = large ? std::max<int64_t>(kCachedPosition / conv.in_channels, 8 * rows)
                             : std::clamp<int64_t>(kCachedGroup / (positions * conv.in_channels), 4 * rows, 8 * rows);
  const auto room = [&](int64_t group, int64_t range) {
    return positions * winograd_plane(group, kernels.panel) * (large ? range : 1);
  };
  const int64_t fixed_groups = sums ? even_blocks(divide_up(tiles, most)) : 0;
  if (sums) {
    sums->reserve(conv.out_channels, fixed_groups);
    for (int64_t i = 0; i < fixed_groups; ++i) {
      sums->pixels[i] = conv.pixels_of((i + 1) * tiles / fixed_groups) - conv.pixels_of(i * tiles / fixed_groups);
    }
  }
  const auto multiply = [&](int64_t i, int64_t first, int64_t count, int64_t begin, int64_t end, const float* v,
                            float* m) {
    WinogradConv group = conv;
    if (sums) group.sums = sums->block(i);
    return kernels.multiply(group, first, count, begin, end, large ? end - begin : 1, v, m);
  };
  if (panels >= threads && (tiles <= 12 * threads || (large && tiles < conv.out_channels))) {
    std::vector<char> finite(panels, 1);
    const int64_t groups = sums ? fixed_groups : large ? divide_up(tiles, most) : 1;
    const Scratch v(positions * winograd_plane(divide_up(tiles, groups), conv.in_channels));
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t first = i * tiles / groups, count = (i + 1) * tiles / groups - first;
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        kernels.transform(conv, first, count, begin, end, v.data());
      });
      const int64_t parts = std::min(panels, 2 * threads);
      share_tasks(parts, [&](const auto& take) {
        const Scratch m(room(count, divide_up(panels, parts)));
        for (int64_t part = take(); part >= 0; part = take()) {
          const int64_t begin = part * panels / parts, end = (part + 1) * panels / parts;
          finite[begin] &= multiply(i, first, count, begin, end, v.data(), m.data());
        }
      });
    }
    return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
  }
  const int64_t groups = sums ? fixed_groups : divide_up(divide_up(tiles, most), threads) * threads;
  const int64_t group = divide_up(tiles, groups);
  std::vector<char> finite(groups, 1);
  share_tasks(groups, [&](const auto& take) {
    const int64_t v_floats = positions * winograd_plane(group, conv.in_channels);
    const Scratch scratch(v_floats + room(group, panels));
    float *v = scratch.data(), *m = v + v_floats;
    for (int64_t i = take(); i >= 0; i = take()) {
      const int64_t first = i * tiles / groups, count = (i + 1) * tiles / groups - first;
      kernels.transform(conv, first, count, 0, count, v);
      finite[i] = multiply(i, first, count, 0, panels, v, m);
    }
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

// The direct way with the weights of a packed Winograd convolution, which are recovered to fp32 rounding.
void conv_without_winograd(const Geometry& g, const WinogradConv& conv) {
  const WinogradKernels& kernels = winograd_kernels(conv.tile);
  const Scratch plain(9 * g.in_channels * g.out_channels);
  for (int64_t i = 0; i < divide_up(g.out_channels, kernels.panel); ++i) kernels.unpack(conv, i, plain.data());
  const Taps taps = forward_taps(g);
  const Scratch packed(gemm_floats(taps, g.in_channels, g.out_channels));
  const int64_t c = g.in_channels;
  pack_gemm({plain.data(), g.out_channels, c, 3, 3, 9 * c, 1, 3 * c, c}, taps, packed.data());
  conv_gemm(g, {conv.x, conv.dtype}, packed.data(), conv.epilogue, conv.y);
}

}  // namespace

WinogradConv winograd_of(const Geometry& g, int64_t tile, const Activation& x, const float* packed,
                         const Epilogue& epilogue, void* y) {
  return {tile,         g.images,    g.height,       g.width, g.in_channels,
          g.out_height, g.out_width, g.out_channels, g.pad_h, g.pad_w,
          x.dtype,      x.data,      packed,         y,       epilogue};
}

void conv_winograd(const Geometry& g, int64_t tile, const Activation& x, const float* packed, const Epilogue& epilogue,
                   void* y, BlockSums* sums) {
  const WinogradConv conv = winograd_of(g, tile, x, packed, epilogue, y);
  if (run_winograd(conv, sums)) return;
  if (sums) *sums = {};
  conv_without_winograd(g, conv);
}

Activation nhwc(const Tensor& t, const char* name) {
  check_dense(t, true, name);
  return {t.const_data_ptr(), dtype_index(t)};
}

// By an estimate of the time, in multiplications for each pair of an input and an output channel. Winograd's transforms cost a fifth
// more; weights too large for a core's cache are read from the last one or from memory on every call, at the price of kRead
// multiplications a value (both as measured on two cores of Zen 3: 170 GFLOP/s, 25 GB/s).
Method method_of(const Geometry& g, bool winograd) {
  if (g.groups > 1) return grouped_kernels().serves(group_shape(g), g.kernel_h * g.kernel_w) ? kGrouped : kNone;
  if (winograd && stem_fits(g)) return kStem;
  if (!winograd || !winograd_fits(g)) return kGemm;
  constexpr double kTransforms = 1.2, kRead = 11;
  constexpr int64_t kCached = 1 << 17;  // values
  const auto read = [&](int64_t places) {
    return places * g.in_channels * g.out_channels > kCached ? kRead * places : 0;
  };
  const auto tiles = [&](int64_t tile) {
    return g.images * divide_up(g.out_height, tile) * divide_up(g.out_width, tile);
  };
  const double gemm = 9.0 * g.pixels() + read(9);
  const double four = kTransforms * 36 * tiles(4) + read(36), two = kTransforms * 16 * tiles(2) + read(16);
  if (four <= two && four < gemm) return kWinograd4;
  return two < gemm ? kWinograd2 : kGemm;
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
  const int64_t tile = winograd_tile(method);
  STD_TORCH_CHECK(method >= kGemm && method <= kStem, "method must be 1 to 5");
  STD_TORCH_CHECK(method != kStem || stem_fits(g), "method 5 does not serve this convolution");
  if (tile > 0) {
    STD_TORCH_CHECK(winograd_fits(g), "Winograd does not serve this convolution");
    Tensor packed = cached_empty(winograd_floats(g, tile));
    const bool finite = pack_winograd(view_of(weight, 0, 1), tile, static_cast<float*>(packed.mutable_data_ptr()));
    return finite ? packed : cached_empty(0);
  }
  const Taps taps = forward_taps(g);
  if (method == kGrouped) {
    const GroupShape shape = group_shape(g);
    STD_TORCH_CHECK(grouped_kernels().serves(shape, taps.count()), "method 4 does not serve this convolution");
    Tensor packed = cached_empty(grouped_floats(shape, taps));
    pack_grouped(shape, view_of(weight, 0, groups), g.group_out() * weight.stride(0), taps,
                 static_cast<float*>(packed.mutable_data_ptr()));
    return packed;
  }
  const int64_t floats = gemm_floats(taps, g.group_in(), g.group_out());
  Tensor packed = cached_empty(groups * floats + (method == kStem ? stem_floats(g) : 0));
  float* out = static_cast<float*>(packed.mutable_data_ptr());
  if (method == kStem && !pack_stem(g, view_of(weight, 0, 1), out + floats)) return cached_empty(0);
  for (int64_t group = 0; group < groups; ++group)
    pack_gemm(view_of(weight, group, groups), taps, out + group * floats);
  return packed;
}

}  // namespace

Tensor convolve(const Tensor& x, const Tensor& packed, const Geometry& g, const OptionalTensor& bias,
                const OptionalTensor& residual, bool relu, int64_t method, BlockSums* sums) {
  const Activation x_data = nhwc(x, "x");
  Tensor y = cached_empty(g.images, g.out_channels, g.out_height, g.out_width, x.scalar_type(), true);
  if (residual.has_value()) check_like(*residual, y, true, "residual");
  std::vector<float> bias_data;
  if (bias.has_value()) bias_data = padded_bias(floats(bias, g.out_channels, "bias"), g.out_channels);
  const Epilogue epilogue{bias.has_value() ? bias_data.data() : nullptr,
                          residual.has_value() ? residual->const_data_ptr() : nullptr, relu};
  void* y_data = y.mutable_data_ptr();
  const int64_t tile = winograd_tile(method);
  STD_TORCH_CHECK(method >= kGemm && method <= kStem, "method must be 1 to 5");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous(),
                  "packed weight must be what conv_pack returned");
  const float* weight_data = static_cast<const float*>(packed.const_data_ptr());
  if (g.pixels() == 0) return y;
  if (tile > 0) {
    STD_TORCH_CHECK(winograd_fits(g) && packed.numel() == winograd_floats(g, tile), "packed weight does not fit");
    conv_winograd(g, tile, x_data, weight_data, epilogue, y_data, sums);
    return y;
  }
  if (method == kGrouped) {
    STD_TORCH_CHECK(
        method_of(g, false) == kGrouped && packed.numel() == grouped_floats(group_shape(g), forward_taps(g)),
        "packed weight does not fit");
    conv_grouped(g, fp32(x_data), weight_data, epilogue, static_cast<float*>(y_data));
    return y;
  }
  STD_TORCH_CHECK(method == kGemm || stem_fits(g), "method 5 does not serve this convolution");
  const int64_t direct = g.groups * gemm_floats(forward_taps(g), g.group_in(), g.group_out());
  STD_TORCH_CHECK(packed.numel() == direct + (method == kStem ? stem_floats(g) : 0), "packed weight does not fit");
  if (method == kStem && x_data.dtype == 0 && !residual.has_value() &&
      conv_stem(g, x_data, weight_data + direct, epilogue, static_cast<float*>(y_data))) {
    return y;
  }
  if (sums != nullptr && g.groups == 1) {
    const ForwardGemm gemm(g, x_data, weight_data, epilogue, y_data);
    run_gemm(gemm.conv, {}, sums);
  } else {
    conv_gemm(g, x_data, weight_data, epilogue, y_data);
  }
  return y;
}

namespace {

Tensor conv(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t groups, bool relu, int64_t method) {
  check_dense(x, true, "x");
  const Geometry g({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, groups);
  return convolve(x, packed, g, bias, residual, relu, method, nullptr);
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
