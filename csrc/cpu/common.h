// What the bindings share: types, per-channel parameters, and how work is cut into chunks.
#pragma once

#include <cmath>
#include <vector>

#include "checks.h"

namespace fastres {

inline int dtype_index(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "fastres_cpu serves float32, bfloat16 and float16");
  }
  return -1;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N, C, H, W of an activation, and the values a channel has.
struct Shape {
  int64_t images, channels, height, width;
  explicit Shape(const Tensor& x) : images(x.size(0)), channels(x.size(1)), height(x.size(2)), width(x.size(3)) {}
  int64_t plane() const { return height * width; }
  int64_t count() const { return images * plane(); }
};

// The chunks of a reduction depend on the shape only, never on the number of threads: results are bitwise repeatable.
struct Chunks {
  int64_t size, count;
  Chunks(int64_t runs, int64_t run_length) {
    constexpr int64_t kValues = 1 << 16;  // 256 KB of fp32: fits in L2
    size = divide_up(divide_up(kValues, run_length > 0 ? run_length : 1), 16) * 16;
    count = divide_up(runs, size);
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk, int64_t runs) const { return begin(chunk) + size < runs ? begin(chunk) + size : runs; }
};

template <class F>
void parallel_chunks(int64_t runs, int64_t run_length, const F& f) {
  const Chunks chunks(runs, run_length);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) f(chunks.begin(chunk), chunks.end(chunk, runs));
  });
}

struct Sums {
  std::vector<double> first, second;  // a value a channel
};

// f(begin, end, sum1, sum2): NHWC, rows cut into chunks whose partial sums are added in order; NCHW, channels cut into ranges.
template <class F>
Sums reduce(const Shape& shape, bool channels_last, const F& f) {
  const int64_t channels = shape.channels;
  Sums sums{std::vector<double>(channels), std::vector<double>(channels)};
  if (!channels_last) {
    torch::stable::parallel_for(
        0, channels, 1, [&](int64_t begin, int64_t end) { f(begin, end, sums.first.data(), sums.second.data()); });
    return sums;
  }
  const Chunks chunks(shape.count(), channels);
  std::vector<double> partial(2 * channels * chunks.count);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* sum = partial.data() + 2 * channels * chunk;
      f(chunks.begin(chunk), chunks.end(chunk, shape.count()), sum, sum + channels);
    }
  });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    for (int64_t c = 0; c < channels; ++c) {
      sums.first[c] += partial[2 * channels * chunk + c];
      sums.second[c] += partial[2 * channels * chunk + channels + c];
    }
  }
  return sums;
}

// Per-channel values as the kernels want them: floats, padded to whole vectors (see bn_act.h for the formulas).
class Parameters {
 public:
  Parameters(int64_t channels, const double* mean, const double* var, const float* weight, const float* bias,
             double eps)
      : channels_(channels),
        stride_(divide_up(channels, 16) * 16),
        values_(5 * stride_),
        rest_(channels),
        inverse_(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const double inverse = 1.0 / std::sqrt(var[c] + eps), scale = weight ? weight[c] * inverse : inverse;
      inverse_[c] = inverse;
      row(0)[c] = static_cast<float>(mean[c]);
      rest_[c] = std::isfinite(mean[c]) ? mean[c] - row(0)[c] : 0.0;
      row(1)[c] = static_cast<float>(scale);
      row(2)[c] = static_cast<float>((bias ? bias[c] : 0.0) - rest_[c] * scale);
    }
  }

  // With the sums of the backward reduction: the gradients of weight and bias, and (if batch statistics were used) the terms
  // by which x moved the statistics.
  void set_gradients(const Sums& sums, double count, bool training, const float* weight, float* grad_weight,
                     float* grad_bias) {
    for (int64_t c = 0; c < channels_; ++c) {
      const double grad_b = sums.first[c], grad_w = inverse_[c] * (sums.second[c] - rest_[c] * sums.first[c]);
      if (grad_weight) grad_weight[c] = static_cast<float>(grad_w);
      if (grad_bias) grad_bias[c] = static_cast<float>(grad_b);
      if (training) set_terms(c, grad_w, grad_b, count, weight);
    }
  }

  // The terms of channel c, from the gradients of weight and bias over the `count` values that the statistics are of.
  void set_terms(int64_t c, double grad_w, double grad_b, double count, const float* weight) {
    const double scale = weight ? weight[c] * inverse_[c] : inverse_[c];
    const double slope = -scale * inverse_[c] * grad_w / count;
    row(3)[c] = static_cast<float>(slope);
    row(4)[c] = static_cast<float>(-scale * grad_b / count - slope * rest_[c]);
  }

  // training: batch statistics were used, grad_x has the terms of set_terms.
  template <class Args>
  void give(Args* args, bool training) {
    args->mean = row(0);
    args->scale = row(1);
    args->shift = row(2);
    args->slope = training ? row(3) : nullptr;
    args->offset = training ? row(4) : nullptr;
  }

 private:
  float* row(int i) { return values_.data() + i * stride_; }
  int64_t channels_, stride_;
  std::vector<float> values_;
  std::vector<double> rest_, inverse_;  // mean - mean_hi; 1 / sqrt(var + eps)
};

// A point near each channel's mean, from a few values of it; padded to a multiple of 16 (bn_act.cpp).
std::vector<float> reference_points(const Tensor& x, bool channels_last);
// Mean and biased variance of each channel of x, in one pass over x (bn_act.cpp).
void batch_statistics(const Tensor& x, bool channels_last, double* mean, double* var);

inline const float* floats(const OptionalTensor& t, int64_t channels, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == channels, name,
                  " must be a contiguous float32 tensor of ", channels, " values");
  return static_cast<const float*>(t->const_data_ptr());
}
inline const double* doubles(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == channels, name,
                  " must be a contiguous float64 tensor of ", channels, " values");
  return static_cast<const double*>(t.const_data_ptr());
}

}  // namespace fastres
