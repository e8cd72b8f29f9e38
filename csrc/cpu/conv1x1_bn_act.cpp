// fastres_cpu::conv1x1_bn_act and its backward: act(batch_norm(x W^T) + residual) without the raw convolution output ever lying in
// memory. x: M pixels of C values, W [K, C]; rows are pixels.
//
// Statistics of y = x W^T come from those of x, with m the mean and S the covariance of its channels:
//   mu_k = w_k . m,  var_k = w_k^T S w_k
// and with a = gamma / sqrt(var + eps) the output is one product with folded weights: act(x (a W)^T + (beta - a mu) + residual).
// Backward, with g the gradient behind the activation, G = sum over pixels of g, D = g^T (x - m):
//   grad_beta = G,  grad_gamma = P / sqrt(var + eps),  P_k = sum of g_k (y_k - mu_k) = w_k . D_k
//   grad_y = a g + b (y - mu) + e  with  b = -a P / (M (var + eps)),  e = -a G / M
//   grad_W = a D + b M W S               (the values of grad_y sum to zero, so x may be centred)
//   grad_x = g (a W) + (x - m) Q + e W   with  Q = W^T b W
// With running statistics b = e = 0, and grad_W = a g^T x. Sums over pixels are taken of x minus a point near its mean.
//
// Where mu and var are those of the pixels of several processes (synchronised batch norm), d = W m - mu is not zero:
//   P_k = w_k . D_k + d_k G_k  of this process; b and e take P, G and M of all of them; with e' = e + b d
//   grad_W = a D + b n W S + (a G + n e') m^T,  grad_x = g (a W) + (x - m) Q + e' W,  n the pixels of this process
//
// Activations are stored as fp32, bf16 or fp16; all else is fp32 or float64.
#include <cmath>

#include "bn_act.h"
#include "conv_methods.h"
#include "gram.h"

namespace fastres {
namespace {

using Doubles = std::vector<double>;

double* doubles_of(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

struct Moments {
  Doubles mean, covariance;  // [channels], [channels][channels]
};

// The pixels are cut into parts whose sums are added in order: how many depends on the shape alone.
Moments moments_of(const Tensor& x) {
  const GramKernels& kernels = gram_kernels();
  const Shape shape(x);
  const int64_t channels = shape.channels, pixels = shape.count();
  const int64_t padded = divide_up(channels, kernels.lanes) * kernels.lanes;
  constexpr int64_t kBlock = 64, kParts = 8;
  const int64_t blocks = divide_up(pixels, kBlock), parts = std::min(blocks, kParts);
  const Activation values = nhwc(x, "x");
  const ToFloat to_float = to_float_kernel(values.dtype);
  const std::vector<float> near = reference_points(x, true);
  const Doubles point(near.begin(), near.begin() + channels);
  std::vector<Doubles> first(parts), second(parts);
  share_tasks(parts, [&](const auto& take) {
    Doubles scratch(kBlock * padded);
    std::vector<float> copy(values.dtype == 0 ? 0 : kBlock * channels);
    for (int64_t part = take(); part >= 0; part = take()) {
      first[part].resize(channels);
      second[part].resize(padded * padded);
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        const int64_t count = std::min(kBlock, pixels - i * kBlock);
        const void* block = element(values.data, values.dtype, i * kBlock * channels);
        if (values.dtype != 0) to_float(block, count * channels, copy.data());
        kernels.moments(values.dtype == 0 ? static_cast<const float*>(block) : copy.data(), channels, point.data(),
                        count, scratch.data(), first[part].data(), second[part].data());
      }
    }
  });
  Moments result{Doubles(channels), Doubles(channels * channels)};
  Doubles distance(channels);
  const double count = static_cast<double>(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t part = 0; part < parts; ++part) distance[c] += first[part][c] / count;
    result.mean[c] = point[c] + distance[c];
  }
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = i; j < channels; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += second[part][i * padded + j];
      sum = sum / count - distance[i] * distance[j];
      result.covariance[i * channels + j] = result.covariance[j * channels + i] = sum;
    }
  }
  return result;
}

double inner_product(const float* row, const double* values, int64_t count) {
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += row[c] * values[c];
  return sum;
}

// mu_k and var_k of the formulas above.
void output_statistics(const Moments& x, const float* weight, int64_t rows, double* mean, double* var) {
  const GramKernels& kernels = gram_kernels();
  const int64_t channels = static_cast<int64_t>(x.mean.size());
  const int64_t padded = divide_up(channels, kernels.lanes) * kernels.lanes;
  Doubles packed(padded * (padded + kernels.lanes) / 2);
  kernels.pack(x.covariance.data(), channels, packed.data());
  torch::stable::parallel_for(0, rows, 24, [&](int64_t begin, int64_t end) {
    kernels.quadratic_forms(weight, channels, packed.data(), begin, end, var);
    for (int64_t k = begin; k < end; ++k) {
      mean[k] = inner_product(weight + k * channels, x.mean.data(), channels);
      if (var[k] < 0) var[k] = 0;
    }
  });
}

// Weight [K, C, 1, 1] as rows of C values.
const float* rows_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                      weight.size(2) == 1 && weight.size(3) == 1,
                  "conv_weight must be a contiguous float32 tensor of sizes [K, C, 1, 1]");
  return static_cast<const float*>(weight.const_data_ptr());
}

// gamma / sqrt(var + eps)
Doubles scales(const double* var, const float* gamma, int64_t channels, double eps) {
  Doubles scale(channels);
  for (int64_t k = 0; k < channels; ++k) scale[k] = (gamma ? gamma[k] : 1.0) / std::sqrt(var[k] + eps);
  return scale;
}

std::vector<float> scaled_rows(const float* weight, const Doubles& scale, int64_t columns) {
  std::vector<float> scaled(scale.size() * columns);
  for (size_t k = 0; k < scale.size(); ++k) {
    for (int64_t c = 0; c < columns; ++c)
      scaled[k * columns + c] = static_cast<float>(weight[k * columns + c] * scale[k]);
  }
  return scaled;
}

// out[row] = sum over i of rows[row][i] * weight(out channel, i) (+ bias) (+ residual), by the product of the 1x1 convolutions.
void product(int64_t rows, const Activation& values, const WeightView& weight, const Epilogue& epilogue, void* out) {
  const Geometry g({1, weight.in_channels, rows, 1}, {weight.out_channels, weight.in_channels, 1, 1}, {1, 1}, {0, 0},
                   {1, 1}, 1);
  const Taps taps = forward_taps(g);
  const Scratch packed(gemm_floats(taps, g.in_channels, g.out_channels));
  pack_gemm(weight, taps, packed.data());
  conv_gemm(g, values, packed.data(), epilogue, out);
}

Geometry geometry_of(const Tensor& x, const Tensor& weight) {
  return Geometry({x.size(0), x.size(1), x.size(2), x.size(3)}, {weight.size(0), weight.size(1), 1, 1}, {1, 1}, {0, 0},
                  {1, 1}, 1);
}

// mean, var: of the output. x_mean, covariance: the moments of x that backward takes.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_statistics(const Tensor& x, const Tensor& conv_weight) {
  const Geometry g = geometry_of(x, conv_weight);
  STD_TORCH_CHECK(g.pixels() > 0, "x is empty");
  const int64_t out = g.out_channels, in = g.in_channels;
  Tensor mean = empty_of(x, out, ScalarType::Double), var = empty_of(x, out, ScalarType::Double);
  Tensor x_mean = empty_of(x, in, ScalarType::Double), covariance = empty_of(x, in * in, ScalarType::Float);
  const Moments moments = moments_of(x);
  output_statistics(moments, rows_of(conv_weight), out, doubles_of(mean), doubles_of(var));
  std::copy(moments.mean.begin(), moments.mean.end(), doubles_of(x_mean));
  std::copy(moments.covariance.begin(), moments.covariance.end(), floats_of(covariance));
  return {mean, var, x_mean, covariance};
}

// The statistics that are used: running ones, and then no moments.
std::tuple<Tensor, Tensor, Tensor, Tensor> given_statistics(const Tensor& x, int64_t channels,
                                                            const OptionalTensor& running_mean,
                                                            const OptionalTensor& running_var) {
  STD_TORCH_CHECK(running_mean.has_value() && running_var.has_value(), "running statistics are missing");
  Tensor mean = empty_of(x, channels, ScalarType::Double), var = empty_of(x, channels, ScalarType::Double);
  std::memcpy(doubles_of(mean), doubles(*running_mean, channels, "running_mean"), channels * sizeof(double));
  std::memcpy(doubles_of(var), doubles(*running_var, channels, "running_var"), channels * sizeof(double));
  return {mean, var, empty_of(x, 0, ScalarType::Double), empty_of(x, 0, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv1x1_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& residual,
    bool training, double eps, bool relu, bool save_mask) {
  const Activation values = nhwc(x, "x");
  const float* rows = rows_of(conv_weight);
  const Geometry g = geometry_of(x, conv_weight);
  STD_TORCH_CHECK(g.pixels() > 0, "x is empty");
  const int64_t out = g.out_channels, in = g.in_channels;
  const auto [mean, var, x_mean, covariance] =
      training ? conv1x1_statistics(x, conv_weight) : given_statistics(x, out, running_mean, running_var);
  const Doubles scale = scales(doubles_of(var), floats(weight, out, "weight"), out, eps);
  const float* beta = floats(bias, out, "bias");
  std::vector<float> shift(padded_channels(out));
  for (int64_t k = 0; k < out; ++k) {
    shift[k] = static_cast<float>((beta ? beta[k] : 0.0) - scale[k] * doubles_of(mean)[k]);
  }
  Tensor y = cached_empty(g.images, out, g.out_height, g.out_width, x.scalar_type(), true);
  if (residual.has_value()) check_like(*residual, y, true, "residual");
  const std::vector<float> folded = scaled_rows(rows, scale, in);
  const Scratch packed(gemm_floats(forward_taps(g), in, out));
  pack_gemm({folded.data(), out, in, 1, 1, in, 1, 1, 1}, forward_taps(g), packed.data());
  const Epilogue epilogue{shift.data(), residual.has_value() ? residual->const_data_ptr() : nullptr, relu};
  const ForwardGemm gemm(g, values, packed.data(), epilogue, y.mutable_data_ptr());
  Tensor mask = empty_of(x, save_mask ? g.pixels() * divide_up(out, 8) : 0, ScalarType::Byte);
  if (save_mask) {
    uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
    run_gemm(gemm.conv, [&](int64_t begin, int64_t end) {  // while these pixels of y are in the cache
      gram_kernels().mask_of_relu[values.dtype](y.const_data_ptr(), out, begin, end, bits);
    });
  } else {
    run_gemm(gemm.conv);
  }
  return {y, mean, var, x_mean, covariance, mask};
}

// G of the formulas above; with a mask also g, which is grad_y where the mask has a 1.
Doubles masked_gradient(const Tensor& grad_y, const OptionalTensor& mask, void* masked) {
  const Shape shape(grad_y);
  const std::vector<float> zeros(padded_channels(shape.channels));
  BnAct args{};
  args.channels = args.length = shape.channels;
  args.runs = shape.count();
  args.x = args.grad_y = grad_y.const_data_ptr();
  args.mean = zeros.data();
  if (mask.has_value()) {
    args.mask_stride = divide_up(shape.channels, 8);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->numel() == args.runs * args.mask_stride,
                    "mask does not belong to grad_y");
    args.mask = const_cast<uint8_t*>(static_cast<const uint8_t*>(mask->const_data_ptr()));
    args.grad_residual = masked;
  }
  const BnActKernels& kernels = bn_act_kernels(dtype_index(grad_y), true);
  return reduce(shape, true,
                [&](int64_t begin, int64_t end, double* sum1, double* sum2) {
                  kernels.backward_reduce(args, begin, end, sum1, sum2);
                })
      .first;
}

void check_like_output(const Tensor& grad_y, const Tensor& x, const Geometry& g) {
  check_dense(grad_y, true, "grad_y");
  check_gradient(grad_y, g);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
}

// What a process adds up of its own pixels: g (empty without a mask: it is grad_y), D, P and G. x_mean: m, empty with running
// statistics.
struct Reduced {
  Tensor masked, d;
  Doubles p, sum;
};

Reduced reduce_backward(const Tensor& grad_y, const Tensor& x, const Tensor& conv_weight, const Tensor& mean,
                        const Tensor& x_mean, const OptionalTensor& mask, bool need_d) {
  const Activation values = nhwc(x, "x");
  const float* rows = rows_of(conv_weight);
  const Geometry g = geometry_of(x, conv_weight);
  check_like_output(grad_y, x, g);
  const int64_t out = g.out_channels, in = g.in_channels;
  const double* mu = doubles(mean, out, "mean");
  const bool centred = x_mean.numel() > 0;
  Doubles m(in);
  if (centred) std::memcpy(m.data(), doubles(x_mean, in, "x_mean"), in * sizeof(double));
  Reduced result{mask.has_value() ? cached_empty_like(grad_y) : empty_of(grad_y, 0, grad_y.scalar_type()),
                 cached_empty(out, in, 1, 1, ScalarType::Float, true),
                 Doubles(out),
                 {}};
  result.sum = masked_gradient(grad_y, mask, result.masked.mutable_data_ptr());
  if (!need_d) return result;
  const Activation gradient{mask.has_value() ? result.masked.const_data_ptr() : grad_y.const_data_ptr(), values.dtype};
  // D, with m rounded to float, and then by what the rounding left.
  std::vector<float> origin(padded_channels(in));
  for (int64_t c = 0; c < in; ++c) origin[c] = static_cast<float>(m[c]);
  float* d = floats_of(result.d);
  weight_gradient(g, gradient, values, centred ? origin.data() : nullptr, d);
  torch::stable::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const double sum = result.sum[k];
      result.p[k] = (inner_product(rows + k * in, m.data(), in) - mu[k]) * sum;
      for (int64_t c = 0; c < in; ++c) {
        d[k * in + c] = static_cast<float>(d[k * in + c] - sum * (m[c] - origin[c]));
        result.p[k] += static_cast<double>(rows[k * in + c]) * d[k * in + c];
      }
    }
  });
  return result;
}

// P, G and M of all pixels that the statistics are of. count 0: they are running statistics.
struct Totals {
  const double *p, *sum;
  double count;
};

// grad_W, which takes the place of D, and grad_x; `sum`: G of this process; gradient: g.
Tensor apply_backward(const Tensor& gradient, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight,
                      const Tensor& mean, const Tensor& var, const Tensor& x_mean, const Tensor& covariance,
                      const Tensor& grad_conv_weight, const double* sum, const Totals& totals, double eps, bool need_x,
                      bool need_conv_weight) {
  const Activation values = nhwc(x, "x"), g_values = nhwc(gradient, "gradient");
  const float* rows = rows_of(conv_weight);
  const Geometry g = geometry_of(x, conv_weight);
  check_like_output(gradient, x, g);
  const int64_t out = g.out_channels, in = g.in_channels;
  const bool training = totals.count > 0;
  const double *mu = doubles(mean, out, "mean"), *variance = doubles(var, out, "var");
  const Doubles scale = scales(variance, floats(weight, out, "weight"), out, eps);
  const double* m = nullptr;
  const float* cov = nullptr;
  Doubles b(out), e(out), rest(out);  // rest: a G + n e'
  if (training) {
    STD_TORCH_CHECK(covariance.scalar_type() == ScalarType::Float && covariance.numel() == in * in,
                    "covariance must be a float32 tensor of C * C values");
    m = doubles(x_mean, in, "x_mean");
    cov = static_cast<const float*>(covariance.const_data_ptr());
  }
  const double pixels = static_cast<double>(g.pixels());
  for (int64_t k = 0; training && k < out; ++k) {
    const double moved = inner_product(rows + k * in, m, in) - mu[k];
    b[k] = -scale[k] * totals.p[k] / (totals.count * (variance[k] + eps));
    e[k] = b[k] * moved - scale[k] * totals.sum[k] / totals.count;
    rest[k] = scale[k] * sum[k] + pixels * e[k];
  }
  const std::vector<float> turned = scaled_rows(rows, b, in);  // b W
  if (need_conv_weight) {
    float* d = floats_of(grad_conv_weight);
    std::vector<float> moved(training ? out * in : 0);  // b W S
    if (training)
      product(out, {turned.data(), 0}, {cov, in, in, 1, 1, in, 1, 1, 1}, {nullptr, nullptr, false}, moved.data());
    torch::stable::parallel_for(0, out, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t c = 0; c < in; ++c) {
          const double more = training ? pixels * moved[k * in + c] + rest[k] * m[c] : 0.0;
          d[k * in + c] = static_cast<float>(scale[k] * d[k * in + c] + more);
        }
      }
    });
  }
  if (!need_x) return empty_of(x, 0, x.scalar_type());
  Tensor grad_x = cached_empty_like(x);
  const std::vector<float> folded = scaled_rows(rows, scale, in);
  const WeightView back{folded.data(), in, out, 1, 1, 1, in, 1, 1};
  if (training) {
    std::vector<float> q(in * in), offset(padded_channels(in));
    const Geometry square({1, in, out, 1}, {in, in, 1, 1}, {1, 1}, {0, 0}, {1, 1}, 1);
    weight_gradient(square, {turned.data(), 0}, {rows, 0}, nullptr, q.data());
    for (int64_t c = 0; c < in; ++c) {
      double h = 0;
      for (int64_t k = 0; k < out; ++k) h += e[k] * rows[k * in + c];
      for (int64_t i = 0; i < in; ++i) h -= q[c * in + i] * m[i];
      offset[c] = static_cast<float>(h);
    }
    product(g.pixels(), values, {q.data(), in, in, 1, 1, in, 1, 1, 1}, {offset.data(), nullptr, false},
            grad_x.mutable_data_ptr());
  }
  product(g.pixels(), g_values, back, {nullptr, training ? grad_x.const_data_ptr() : nullptr, false},
          grad_x.mutable_data_ptr());
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv1x1_bn_act_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight, const Tensor& mean,
    const Tensor& var, const Tensor& x_mean, const Tensor& covariance, const OptionalTensor& mask, bool training,
    double eps, bool need_x, bool need_conv_weight, bool need_affine) {
  const bool need_d = need_conv_weight || need_affine || (need_x && training);
  const Reduced reduced = reduce_backward(grad_y, x, conv_weight, mean, x_mean, mask, need_d);
  const int64_t out = static_cast<int64_t>(reduced.sum.size());
  const double* variance = doubles(var, out, "var");
  Tensor grad_weight = empty_of(x, need_affine ? out : 0, ScalarType::Float);
  Tensor grad_bias = empty_of(x, need_affine ? out : 0, ScalarType::Float);
  for (int64_t k = 0; need_affine && k < out; ++k) {
    floats_of(grad_weight)[k] = static_cast<float>(reduced.p[k] / std::sqrt(variance[k] + eps));
    floats_of(grad_bias)[k] = static_cast<float>(reduced.sum[k]);
  }
  const double count = training ? static_cast<double>(Shape(x).count()) : 0.0;
  const Tensor grad_x = apply_backward(mask.has_value() ? reduced.masked : grad_y, x, conv_weight, weight, mean, var,
                                       x_mean, covariance, reduced.d, reduced.sum.data(),
                                       {reduced.p.data(), reduced.sum.data(), count}, eps, need_x, need_conv_weight);
  return {grad_x, need_conv_weight ? reduced.d : empty_of(x, 0, ScalarType::Float), grad_weight, grad_bias,
          reduced.masked};
}

// The two halves of it, for statistics of several processes: P and G as float64 tensors, to be added up over the processes in
// between.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_backward_reduce(const Tensor& grad_y, const Tensor& x,
                                                                   const Tensor& conv_weight, const Tensor& mean,
                                                                   const Tensor& x_mean, const OptionalTensor& mask) {
  const Reduced reduced = reduce_backward(grad_y, x, conv_weight, mean, x_mean, mask, true);
  const int64_t out = static_cast<int64_t>(reduced.sum.size());
  Tensor p = empty_of(x, out, ScalarType::Double), sum = empty_of(x, out, ScalarType::Double);
  std::copy(reduced.p.begin(), reduced.p.end(), doubles_of(p));
  std::copy(reduced.sum.begin(), reduced.sum.end(), doubles_of(sum));
  return {reduced.masked, reduced.d, p, sum};
}

// grad_conv_weight has D, and then the gradient.
Tensor conv1x1_backward_apply(const Tensor& gradient, const Tensor& x, const Tensor& conv_weight,
                              const OptionalTensor& weight, const Tensor& mean, const Tensor& var, const Tensor& x_mean,
                              const Tensor& covariance, const Tensor& grad_conv_weight, const Tensor& sum,
                              const Tensor& total_p, const Tensor& total_sum, double count, double eps, bool need_x,
                              bool need_conv_weight) {
  const int64_t out = conv_weight.size(0);
  STD_TORCH_CHECK(count > 0 && grad_conv_weight.numel() == conv_weight.numel() &&
                      grad_conv_weight.scalar_type() == ScalarType::Float && grad_conv_weight.is_contiguous(),
                  "grad_conv_weight or count does not fit");
  return apply_backward(
      gradient, x, conv_weight, weight, mean, var, x_mean, covariance, grad_conv_weight, doubles(sum, out, "sum"),
      {doubles(total_p, out, "total_p"), doubles(total_sum, out, "total_sum"), count}, eps, need_x, need_conv_weight);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "conv1x1_bn_act(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? residual, bool training, float eps, bool relu, bool save_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv1x1_bn_act_backward(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor? weight, Tensor mean, Tensor var, "
      "Tensor x_mean, Tensor covariance, Tensor? mask, bool training, float eps, bool need_x, bool need_conv_weight, "
      "bool need_affine) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv1x1_statistics(Tensor x, Tensor conv_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv1x1_backward_reduce(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor mean, Tensor x_mean, Tensor? mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv1x1_backward_apply(Tensor gradient, Tensor x, Tensor conv_weight, Tensor? weight, Tensor mean, Tensor var, "
      "Tensor x_mean, Tensor covariance, Tensor(a!) grad_conv_weight, Tensor sum, Tensor total_p, Tensor total_sum, "
      "float count, float eps, bool need_x, bool need_conv_weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("conv1x1_bn_act", TORCH_BOX(&fastres::conv1x1_bn_act));
  m.impl("conv1x1_bn_act_backward", TORCH_BOX(&fastres::conv1x1_bn_act_backward));
  m.impl("conv1x1_statistics", TORCH_BOX(&fastres::conv1x1_statistics));
  m.impl("conv1x1_backward_reduce", TORCH_BOX(&fastres::conv1x1_backward_reduce));
  m.impl("conv1x1_backward_apply", TORCH_BOX(&fastres::conv1x1_backward_apply));
}
