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
  const float* data = fp32(nhwc(x, "x"));
  const std::vector<float> near = reference_points(x, true);
  const Doubles point(near.begin(), near.begin() + channels);
  std::vector<Doubles> first(parts), second(parts);
  share_tasks(parts, [&](const auto& take) {
    Doubles scratch(kBlock * padded);
    for (int64_t part = take(); part >= 0; part = take()) {
      first[part].resize(channels);
      second[part].resize(padded * padded);
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        kernels.moments(data, channels, point.data(), i * kBlock, std::min((i + 1) * kBlock, pixels), scratch.data(),
                        first[part].data(), second[part].data());
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
      mean[k] = 0;
      for (int64_t c = 0; c < channels; ++c) mean[k] += weight[k * channels + c] * x.mean[c];
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
void product(int64_t rows, const float* values, const WeightView& weight, const Epilogue& epilogue, float* out) {
  const Geometry g({1, weight.in_channels, rows, 1}, {weight.out_channels, weight.in_channels, 1, 1}, {1, 1}, {0, 0},
                   {1, 1}, 1);
  const Taps taps = forward_taps(g);
  const Scratch packed(gemm_floats(taps, g.in_channels, g.out_channels));
  pack_gemm(weight, taps, packed.data());
  conv_gemm(g, {values, 0}, packed.data(), epilogue, out);
}

Geometry geometry_of(const Tensor& x, const Tensor& weight) {
  return Geometry({x.size(0), x.size(1), x.size(2), x.size(3)}, {weight.size(0), weight.size(1), 1, 1}, {1, 1}, {0, 0},
                  {1, 1}, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv1x1_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& residual,
    bool training, double eps, bool relu, bool save_mask) {
  const float *data = fp32(nhwc(x, "x")), *rows = rows_of(conv_weight);
  const Geometry g = geometry_of(x, conv_weight);
  STD_TORCH_CHECK(g.pixels() > 0, "x is empty");
  const int64_t out = g.out_channels, in = g.in_channels;
  Tensor mean = empty_of(x, out, ScalarType::Double), var = empty_of(x, out, ScalarType::Double);
  Tensor x_mean = empty_of(x, training ? in : 0, ScalarType::Double);
  Tensor covariance = empty_of(x, training ? in * in : 0, ScalarType::Float);
  if (training) {
    const Moments moments = moments_of(x);
    output_statistics(moments, rows, out, doubles_of(mean), doubles_of(var));
    std::copy(moments.mean.begin(), moments.mean.end(), doubles_of(x_mean));
    std::copy(moments.covariance.begin(), moments.covariance.end(), floats_of(covariance));
  } else {
    STD_TORCH_CHECK(running_mean.has_value() && running_var.has_value(), "running statistics are missing");
    std::memcpy(doubles_of(mean), doubles(*running_mean, out, "running_mean"), out * sizeof(double));
    std::memcpy(doubles_of(var), doubles(*running_var, out, "running_var"), out * sizeof(double));
  }
  const Doubles scale = scales(doubles_of(var), floats(weight, out, "weight"), out, eps);
  const float* beta = floats(bias, out, "bias");
  std::vector<float> shift(padded_channels(out));
  for (int64_t k = 0; k < out; ++k) {
    shift[k] = static_cast<float>((beta ? beta[k] : 0.0) - scale[k] * doubles_of(mean)[k]);
  }
  Tensor y = cached_empty(g.images, out, g.out_height, g.out_width, ScalarType::Float, true);
  if (residual.has_value()) check_like(*residual, y, true, "residual");
  const std::vector<float> folded = scaled_rows(rows, scale, in);
  const Scratch packed(gemm_floats(forward_taps(g), in, out));
  pack_gemm({folded.data(), out, in, 1, 1, in, 1, 1, 1}, forward_taps(g), packed.data());
  const Epilogue epilogue{shift.data(), residual.has_value() ? fp32(nhwc(*residual, "residual")) : nullptr, relu};
  const ForwardGemm gemm(g, {data, 0}, packed.data(), epilogue, floats_of(y));
  Tensor mask = empty_of(x, save_mask ? g.pixels() * divide_up(out, 8) : 0, ScalarType::Byte);
  if (save_mask) {
    uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
    run_gemm(gemm.conv, [&](int64_t begin, int64_t end) {  // while these pixels of y are in the cache
      gram_kernels().mask_of_relu(floats_of(y), out, begin, end, bits);
    });
  } else {
    run_gemm(gemm.conv);
  }
  return {y, mean, var, x_mean, covariance, mask};
}

// G of the formulas above; with a mask also g, which is grad_y where the mask has a 1.
Doubles masked_gradient(const Tensor& grad_y, const OptionalTensor& mask, float* masked) {
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
  const BnActKernels& kernels = bn_act_kernels(0, true);
  return reduce(shape, true,
                [&](int64_t begin, int64_t end, double* sum1, double* sum2) {
                  kernels.backward_reduce(args, begin, end, sum1, sum2);
                })
      .first;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv1x1_bn_act_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight, const Tensor& mean,
    const Tensor& var, const Tensor& x_mean, const Tensor& covariance, const OptionalTensor& mask, bool training,
    double eps, bool need_x, bool need_conv_weight, bool need_affine) {
  const float *data = fp32(nhwc(x, "x")), *rows = rows_of(conv_weight);
  const Geometry g = geometry_of(x, conv_weight);
  check_dense(grad_y, true, "grad_y");
  check_gradient(grad_y, g);
  const int64_t out = g.out_channels, in = g.in_channels;
  const double count = static_cast<double>(g.pixels());
  const double *mu = doubles(mean, out, "mean"), *variance = doubles(var, out, "var");
  const Doubles scale = scales(variance, floats(weight, out, "weight"), out, eps);
  Doubles m(in);  // zeros with running statistics
  if (training) {
    STD_TORCH_CHECK(covariance.scalar_type() == ScalarType::Float && covariance.numel() == in * in,
                    "covariance must be a float32 tensor of C * C values");
    std::memcpy(m.data(), doubles(x_mean, in, "x_mean"), in * sizeof(double));
  }
  const float* cov = static_cast<const float*>(covariance.const_data_ptr());

  Tensor masked = mask.has_value() ? cached_empty_like(grad_y) : empty_of(grad_y, 0, ScalarType::Float);
  const Doubles sum = masked_gradient(grad_y, mask, floats_of(masked));
  const float* gradient = mask.has_value() ? floats_of(masked) : fp32(nhwc(grad_y, "grad_y"));

  // D, with m rounded to float, and then by what the rounding left. P.
  std::vector<float> origin(padded_channels(in));
  for (int64_t c = 0; c < in; ++c) origin[c] = static_cast<float>(m[c]);
  Doubles p(out);
  Tensor grad_conv_weight = cached_empty(out, in, 1, 1, ScalarType::Float, true);
  float* d = floats_of(grad_conv_weight);
  if (need_conv_weight || need_affine || (need_x && training)) {
    weight_gradient(g, {gradient, 0}, {data, 0}, training ? origin.data() : nullptr, d);
    torch::stable::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        p[k] = training ? 0.0 : -mu[k] * sum[k];
        for (int64_t c = 0; c < in; ++c) {
          d[k * in + c] = static_cast<float>(d[k * in + c] - sum[k] * (m[c] - origin[c]));
          p[k] += static_cast<double>(rows[k * in + c]) * d[k * in + c];
        }
      }
    });
  }
  Tensor grad_weight = empty_of(x, need_affine ? out : 0, ScalarType::Float);
  Tensor grad_bias = empty_of(x, need_affine ? out : 0, ScalarType::Float);
  Doubles b(out), e(out);
  for (int64_t k = 0; k < out; ++k) {
    const double square = variance[k] + eps;
    if (need_affine) {
      floats_of(grad_weight)[k] = static_cast<float>(p[k] / std::sqrt(square));
      floats_of(grad_bias)[k] = static_cast<float>(sum[k]);
    }
    if (training) {
      b[k] = -scale[k] * p[k] / (count * square);
      e[k] = -scale[k] * sum[k] / count;
    }
  }
  const std::vector<float> turned = scaled_rows(rows, b, in);  // b W
  if (need_conv_weight) {
    std::vector<float> moved(training ? out * in : 0);  // b W S
    if (training)
      product(out, turned.data(), {cov, in, in, 1, 1, in, 1, 1, 1}, {nullptr, nullptr, false}, moved.data());
    torch::stable::parallel_for(0, out, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t c = 0; c < in; ++c) {
          const double rest = training ? count * moved[k * in + c] : 0.0;
          d[k * in + c] = static_cast<float>(scale[k] * d[k * in + c] + rest);
        }
      }
    });
  }
  Tensor grad_x = need_x ? cached_empty_like(x) : empty_of(x, 0, ScalarType::Float);
  if (need_x) {
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
      product(g.pixels(), data, {q.data(), in, in, 1, 1, in, 1, 1, 1}, {offset.data(), nullptr, false},
              floats_of(grad_x));
    }
    product(g.pixels(), gradient, back, {nullptr, training ? floats_of(grad_x) : nullptr, false}, floats_of(grad_x));
  }
  return {grad_x, need_conv_weight ? grad_conv_weight : empty_of(x, 0, ScalarType::Float), grad_weight, grad_bias,
          masked};
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
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("conv1x1_bn_act", TORCH_BOX(&fastres::conv1x1_bn_act));
  m.impl("conv1x1_bn_act_backward", TORCH_BOX(&fastres::conv1x1_bn_act_backward));
}
