// fastres_cpu::conv_backward_input and conv_backward_weight: gradients of convolutions of NHWC activations.
#include "conv_backward.h"

#include <algorithm>
#include <utility>

#include "conv_methods.h"

namespace fastres {
namespace {

// The weight as the data gradient reads it: input and output channels exchanged.
WeightView exchanged(const WeightView& w) {
  return {w.data, w.in_channels, w.out_channels, w.height, w.width, w.stride_c, w.stride_k, w.stride_r, w.stride_s};
}
// Turned by 180 degrees.
WeightView turned(WeightView w) {
  w.data += (w.height - 1) * w.stride_r + (w.width - 1) * w.stride_s;
  w.stride_r = -w.stride_r;
  w.stride_s = -w.stride_s;
  return w;
}

// Stride 1: grad_x is the convolution of grad_y with the exchanged, turned weight. Returns whether the weight is finite:
// places outside of grad_y are zeros here, and zero times infinity would be NaN.
bool input_stride_1(const Geometry& g, const Activation& grad, const WeightView& weight, bool winograd,
                    const Epilogue& epilogue, void* out) {
  const Geometry back({g.images, g.out_channels, g.out_height, g.out_width},
                      {g.in_channels, g.out_channels, g.kernel_h, g.kernel_w}, {1, 1},
                      {g.dilation_h * (g.kernel_h - 1) - g.pad_h, g.dilation_w * (g.kernel_w - 1) - g.pad_w},
                      {g.dilation_h, g.dilation_w}, 1);
  const WeightView view = turned(exchanged(weight));
  if (const int64_t tile = winograd_tile(method_of(back, winograd))) {
    const Scratch packed(winograd_floats(back, tile));
    if (pack_winograd(view, tile, packed.data())) {
      conv_winograd(back, tile, grad, packed.data(), epilogue, out);
      return true;
    }
  }
  const Taps taps = forward_taps(back);
  const Scratch packed(gemm_floats(taps, back.in_channels, back.out_channels));
  if (!pack_gemm(view, taps, packed.data())) return false;
  conv_gemm(back, grad, packed.data(), epilogue, out);
  return true;
}

// Any stride: the pixels of x whose places are equal modulo the stride read the same taps, by a convolution with stride 1 each.
// run(taps, conv) takes one of them; false, where the weight is not finite, ends it all.
template <class F>
bool for_each_phase(const Geometry& g, const Activation& grad, const Epilogue& epilogue, void* out, const F& run) {
  const std::vector<float> zeros(g.out_channels);
  for (int64_t first_h = 0; first_h < std::min(g.stride_h, g.height); ++first_h) {
    for (int64_t first_w = 0; first_w < std::min(g.stride_w, g.width); ++first_w) {
      Taps taps;
      for (int64_t r = 0; r < g.kernel_h; ++r) {
        const int64_t h = first_h + g.pad_h - r * g.dilation_h;  // stride times the row of y that x row first_h meets
        if (h % g.stride_h != 0) continue;
        for (int64_t s = 0; s < g.kernel_w; ++s) {
          const int64_t w = first_w + g.pad_w - s * g.dilation_w;
          if (w % g.stride_w == 0) taps.add(r, s, h / g.stride_h, w / g.stride_w);
        }
      }
      GemmConv conv{};
      conv.images = g.images;
      conv.grid_height = divide_up(g.height - first_h, g.stride_h);
      conv.grid_width = divide_up(g.width - first_w, g.stride_w);
      conv.x = grad.data;
      conv.x_dtype = conv.y_dtype = grad.dtype;
      conv.height = g.out_height;
      conv.width = g.out_width;
      conv.x_pixel = g.out_channels;
      conv.depth = g.group_out();
      conv.step_h = conv.step_w = 1;
      conv.taps = taps.count();
      conv.tap_h = taps.h.data();
      conv.tap_w = taps.w.data();
      conv.zeros = zeros.data();
      conv.y = out;
      conv.y_height = g.height;
      conv.y_width = g.width;
      conv.y_pixel = g.in_channels;
      conv.channels = g.group_in();
      conv.y_step_h = g.stride_h;
      conv.y_step_w = g.stride_w;
      conv.y_first_h = first_h;
      conv.y_first_w = first_w;
      conv.epilogue = epilogue;
      if (!run(taps, conv)) return false;
    }
  }
  return true;
}

bool input_strided(const Geometry& g, const Activation& grad, const WeightView& weight, const Epilogue& epilogue,
                   void* out) {
  const WeightView view = exchanged(weight);
  return for_each_phase(g, grad, epilogue, out, [&](Taps& taps, GemmConv conv) {
    const Scratch packed(std::max<int64_t>(1, gemm_floats(taps, g.out_channels, g.in_channels)));
    if (taps.count() > 0 && !pack_gemm(view, taps, packed.data())) return false;
    conv.weight = packed.data();
    run_gemm(conv);
    return true;
  });
}

bool input_grouped(const Geometry& g, const Activation& grad, const WeightView& weight, const Epilogue& epilogue,
                   void* out) {
  const GroupShape shape{g.out_channels, g.in_channels, g.group_out(), g.group_in()};
  const WeightView view = exchanged(weight);
  const Scratch packed(grouped_floats(shape, forward_taps(g)));
  float* next = packed.data();
  std::vector<Taps> taps_of;
  std::vector<GemmConv> phases;
  const bool finite = for_each_phase(g, grad, epilogue, out, [&](Taps& taps, GemmConv conv) {
    if (!pack_grouped(shape, view, g.group_out() * weight.stride_k, taps, next)) return false;
    conv.weight = next;
    next += grouped_floats(shape, taps);
    taps_of.push_back(std::move(taps));
    phases.push_back(conv);
    return true;
  });
  if (finite) run_grouped(shape, phases);
  return finite;
}

// At large maps ATen's gradients of depthwise convolutions are faster, of the weight if the kernel is small (two cores of Zen 3,
// AVX2: by up to a fifth).
bool large_depthwise(const Geometry& g) {
  return g.group_in() == 1 && g.group_out() == 1 && g.images * g.height * g.width * g.in_channels > 1 << 18;
}
bool input_left(const Geometry& g) {
  if (g.groups == 1) return false;
  const GroupShape shape{g.out_channels, g.in_channels, g.group_out(), g.group_in()};
  return !grouped_kernels().serves(shape, g.kernel_h * g.kernel_w) || large_depthwise(g);
}
bool weight_left(const Geometry& g) { return g.groups > 1 && g.kernel_h * g.kernel_w < 25 && large_depthwise(g); }

// The gradient of x, plus addend if there is one. An empty tensor where the weight is not finite, or where the gradient is left
// to ATen.
Tensor conv_backward_input(const Tensor& grad_y, const Tensor& weight, const std::vector<int64_t>& x,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, bool winograd,
                           const OptionalTensor& addend) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, "weight must be a 4D float32 tensor");
  const Geometry g(x, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, stride, padding, dilation,
                   groups);
  STD_TORCH_CHECK(method_of(g, winograd) != kNone, "this grouped convolution is not served");
  const Activation grad = nhwc(grad_y, "grad_y");
  check_gradient(grad_y, g);
  Epilogue epilogue{nullptr, nullptr, false};
  if (addend.has_value()) {
    const Activation rest = nhwc(*addend, "addend");
    STD_TORCH_CHECK(rest.dtype == grad.dtype && addend->size(0) == g.images && addend->size(1) == g.in_channels &&
                        addend->size(2) == g.height && addend->size(3) == g.width,
                    "addend must have the shape of x and the dtype of grad_y");
    epilogue.residual = rest.data;
  }
  if (input_left(g)) return cached_empty(0);
  Tensor grad_x = cached_empty(g.images, g.in_channels, g.height, g.width, grad_y.scalar_type(), true);
  void* out = grad_x.mutable_data_ptr();
  const WeightView view = view_of(weight, 0, groups);
  const bool plain = g.stride_h == 1 && g.stride_w == 1 && g.dilation_h * (g.kernel_h - 1) >= g.pad_h &&
                     g.dilation_w * (g.kernel_w - 1) >= g.pad_w;
  if (grad_x.numel() == 0) return grad_x;
  const bool finite = groups > 1 ? input_grouped(g, grad, view, epilogue, out)
                      : plain    ? input_stride_1(g, grad, view, winograd, epilogue, out)
                                 : input_strided(g, grad, view, epilogue, out);
  return finite ? grad_x : cached_empty(0);
}

}  // namespace

// The pixels are cut into parts whose sums are added in order: how many depends on the shape alone, so results are repeatable.
void weight_gradient(const Geometry& g, const Activation& grad, const Activation& x, const float* origin, float* out) {
  const WeightGradientKernels& kernels = weight_gradient_kernels();
  const Taps taps = forward_taps(g);
  const bool padded = g.rows_as_taps();
  const Scratch copy(padded ? g.images * (g.height + 2 * g.pad_h) * (g.width + 2 * g.pad_w) * g.in_channels : 1);
  if (padded) pad(g, x, copy.data());
  WeightGradient p{};
  p.grid_height = g.out_height;
  p.grid_width = g.out_width;
  p.x = padded ? copy.data() : x.data;
  p.x_dtype = padded ? 0 : x.dtype;
  p.height = padded ? g.height + 2 * g.pad_h : g.height;
  p.width = padded ? g.width + 2 * g.pad_w : g.width;
  p.x_pixel = g.in_channels;
  p.step_h = g.stride_h;
  p.step_w = g.stride_w;
  p.taps = taps.count();
  p.tap_h = taps.h.data();
  p.tap_w = taps.w.data();
  p.depth = taps.pixels * g.in_channels;
  const std::vector<float> zeros(p.depth);
  p.zeros = zeros.data();
  p.origin = origin;
  p.grad = grad.data;
  p.grad_dtype = grad.dtype;
  p.grad_pixel = p.channels = g.out_channels;

  const int64_t pixels = g.pixels(), floats = g.out_channels * p.taps * p.depth;
  const int64_t block = std::clamp<int64_t>((1 << 15) / g.out_channels / 16 * 16, 64, 256);
  const int64_t blocks = divide_up(pixels, block), panels = divide_up(p.depth, kernels.panel);
  const int64_t parts = std::clamp<int64_t>((1 << 21) / floats, 1, std::min<int64_t>(blocks, 16));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = std::min(panels, divide_up(threads, parts));  // of panels: another thread each
  const Scratch sums(parts * floats);
  const int64_t rows = divide_up(g.out_channels, kernels.tile_rows) * kernels.tile_rows;
  torch::stable::parallel_for(0, parts * floats, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(sums.data() + begin, sums.data() + end, 0.0f);
  });
  torch::stable::parallel_for(0, parts * ranges, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(block * (rows + kernels.panel + g.out_channels));
    std::vector<const void*> table(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / ranges, range = task % ranges;
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        kernels.run(p, i * block, std::min((i + 1) * block, pixels), range * panels / ranges,
                    (range + 1) * panels / ranges, scratch.data(), table.data(), sums.data() + part * floats);
      }
    }
  });
  torch::stable::parallel_for(0, floats, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = sums.data()[i];
      for (int64_t part = 1; part < parts; ++part) sum += sums.data()[part * floats + i];
      out[i] = sum;
    }
  });
}

namespace {

// Returns whether the result is finite: an infinity of x or grad becomes NaN in the transforms.
bool winograd_weight_gradient(const Geometry& g, const Activation& grad, const Activation& x, float* out) {
  const WinogradGradientKernels& kernels = winograd_gradient_kernels();
  const WinogradConv conv = winograd_of(g, 4, x, nullptr, {}, nullptr);
  // Tiles transformed at once: 3 MB of v and of g, for the last cache; tiles of one product: v of a panel in L2.
  const int64_t widest = std::max(g.in_channels, g.out_channels), part = 48;
  const int64_t group = std::min(conv.tiles(), std::max<int64_t>(1, (3 << 18) / (36 * widest) / part) * part);
  const int64_t panels = divide_up(g.in_channels, kernels.panel), rows = divide_up(g.out_channels, kernels.tile_rows);
  const Scratch v(panels * 36 * winograd_plane(group, kernels.panel));
  const Scratch gradient(36 * winograd_plane(group, g.out_channels + 16));
  const int64_t sums_floats = rows * 36 * kernels.tile_rows * kernels.panel;
  const Scratch sums(panels * sums_floats);
  const int64_t ranges = std::min(rows, divide_up(4 * torch::stable::get_num_threads(), panels));  // of rows
  for (int64_t first = 0; first < conv.tiles(); first += group) {
    const int64_t count = std::min(group, conv.tiles() - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      kernels.transform_input(conv, first, count, begin, end, v.data());
      kernels.transform_gradient(conv, grad.data, first, count, begin, end, gradient.data());
    });
    torch::stable::parallel_for(0, panels * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / ranges, range = task % ranges;
        for (int64_t t = 0; t < count; t += part) {
          kernels.multiply(conv, count, t, std::min(t + part, count), panel, range * rows / ranges,
                           (range + 1) * rows / ranges, v.data(), gradient.data(), first + t > 0,
                           sums.data() + panel * sums_floats);
        }
      }
    });
  }
  std::vector<char> finite(panels, 1);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      finite[panel] = kernels.finish(conv, panel, 0, rows, sums.data() + panel * sums_floats, out);
    }
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

// The gradient of a weight of sizes [K, C, R, S], in channels_last layout; an empty tensor where it is left to ATen.
Tensor conv_backward_weight(const Tensor& grad_y, const Tensor& x, const std::vector<int64_t>& weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups, bool winograd) {
  const Geometry g({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(method_of(g, winograd) != kNone, "this grouped convolution is not served");
  const Activation grad = nhwc(grad_y, "grad_y"), x_data = nhwc(x, "x");
  check_gradient(grad_y, g);
  STD_TORCH_CHECK(grad.dtype == x_data.dtype, "grad_y must have the dtype of x");
  const bool stem = g.groups == 1 && method_of(g, winograd) == kStem && g.pixels() > 0;
  if (!stem && weight_left(g)) return cached_empty(0);
  Tensor grad_weight = cached_empty(g.out_channels, g.group_in(), g.kernel_h, g.kernel_w, ScalarType::Float, true);
  float* out = static_cast<float*>(grad_weight.mutable_data_ptr());
  if (g.pixels() == 0) {
    std::fill(out, out + grad_weight.numel(), 0.0f);
    return grad_weight;
  }
  if (stem) {
    if (!stem_weight_gradient(g, grad, x_data, out)) return cached_empty(0);
  } else if (groups > 1) {
    grouped_weight_gradient(g, fp32(grad), fp32(x_data), out);
  } else if (winograd_tile(method_of(g, winograd)) == 0 || !winograd_weight_gradient(g, grad, x_data, out)) {
    weight_gradient(g, grad, x_data, nullptr, out);
  }
  return grad_weight;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "conv_backward_input(Tensor grad_y, Tensor weight, int[] x, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool winograd, Tensor? addend=None) -> Tensor");
  m.def(
      "conv_backward_weight(Tensor grad_y, Tensor x, int[] weight, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool winograd) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("conv_backward_input", TORCH_BOX(&fastres::conv_backward_input));
  m.impl("conv_backward_weight", TORCH_BOX(&fastres::conv_backward_weight));
}
