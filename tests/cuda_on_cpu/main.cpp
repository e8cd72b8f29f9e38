// Every CUDA kernel once in every dtype, layout and width of access, against plain loops in double; buffers have exactly the
// size they need. On the CPU for the sanitizers (tests/test_cuda_sanitize.py), on a device for compute-sanitizer:
//   nvcc -std=c++17 -I csrc/cuda tests/cuda_on_cpu/main.cpp csrc/cuda/*.cu -o check && compute-sanitizer --tool memcheck ./check
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

using namespace fastres::cuda;

namespace {

int failures = 0;
const Queue kQueue{1, nullptr};
const Queue kSmall{2, nullptr, 228 << 10, 227 << 10};  // of blocks that wait for each other, some tiles each

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: error %d\n", what, static_cast<int>(error));
  std::exit(1);
}

// Memory of the device, which is the heap on the CPU: exactly `size` bytes behind an address that is `shift` off a multiple of 16.
class Memory {
 public:
  explicit Memory(size_t size, size_t shift = 0) : size_(size), shift_(shift) {
#ifdef FASTRES_CUDA_ON_CPU
    base_ = std::malloc(size + shift);
#else
    check(cudaMalloc(&base_, size + shift), "cudaMalloc");
#endif
  }
  ~Memory() {
#ifdef FASTRES_CUDA_ON_CPU
    std::free(base_);
#else
    cudaFree(base_);
#endif
  }
  Memory(const Memory&) = delete;
  void* data() const { return static_cast<char*>(base_) + shift_; }
  void set(const void* from) { copy(data(), from); }
  void get(void* to) const { copy(to, data()); }
  size_t size() const { return size_; }

 private:
  void copy(void* to, const void* from) const {
#ifdef FASTRES_CUDA_ON_CPU
    std::memcpy(to, from, size_);
#else
    check(cudaMemcpy(to, from, size_, cudaMemcpyDefault), "cudaMemcpy");
#endif
  }
  size_t size_, shift_;
  void* base_ = nullptr;
};

template <class T>
std::unique_ptr<Memory> upload(const std::vector<T>& values, size_t shift = 0) {
  auto memory = std::make_unique<Memory>(values.size() * sizeof(T), shift);
  memory->set(values.data());
  return memory;
}
template <class T>
std::vector<T> download(const Memory& memory) {
  std::vector<T> values(memory.size() / sizeof(T));
  memory.get(values.data());
  return values;
}

size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }
double epsilon(Dtype dtype) { return dtype == Dtype::kFloat ? 1e-5 : dtype == Dtype::kHalf ? 2e-3 : 1.6e-2; }

// Values rounded to a storage dtype, on their way to and from the device.
std::unique_ptr<Memory> upload(Dtype dtype, std::vector<double>* values, size_t shift) {
  std::vector<char> bytes(values->size() * size_of(dtype));
  for (size_t i = 0; i < values->size(); ++i) {
    const float value = static_cast<float>((*values)[i]);
    if (dtype == Dtype::kFloat) {
      std::memcpy(bytes.data() + 4 * i, &value, 4);
      (*values)[i] = value;
    } else if (dtype == Dtype::kHalf) {
      const __half half = __float2half_rn(value);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
      (*values)[i] = __half2float(half);
    } else {
      const __nv_bfloat16 half = __float2bfloat16_rn(value);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
      (*values)[i] = __bfloat162float(half);
    }
  }
  return upload(bytes, shift);
}
std::vector<double> download(Dtype dtype, const Memory& memory) {
  const std::vector<char> bytes = download<char>(memory);
  std::vector<double> values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::kFloat) {
      float value;
      std::memcpy(&value, bytes.data() + 4 * i, 4);
      values[i] = value;
    } else if (dtype == Dtype::kHalf) {
      __half half;
      std::memcpy(&half, bytes.data() + 2 * i, 2);
      values[i] = __half2float(half);
    } else {
      __nv_bfloat16 half;
      std::memcpy(&half, bytes.data() + 2 * i, 2);
      values[i] = __bfloat162float(half);
    }
  }
  return values;
}

struct Case {
  int64_t n, c, h, w;
  bool channels_last, shifted;
  Dtype dtype;
};

void expect(const Case& t, const char* name, const std::vector<double>& got, const std::vector<double>& want,
            double tolerance) {
  double largest = 1.0;
  for (double v : want) largest = std::fmax(largest, std::fabs(v));
  for (size_t i = 0; i < want.size(); ++i) {
    if (got.size() == want.size() && std::fabs(got[i] - want[i]) <= tolerance * largest) continue;
    std::printf("%s of %ldx%ldx%ldx%ld, dtype %d, channels_last %d, shifted %d: value %zu is %g, not %g\n", name, t.n,
                t.c, t.h, t.w, static_cast<int>(t.dtype), t.channels_last, t.shifted, i, got[i], want[i]);
    ++failures;
    return;
  }
}

std::vector<double> random_values(size_t count, unsigned seed, double mean = 0.0) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(mean, 1.5);
  std::vector<double> values(count);
  for (double& v : values) v = normal(engine);
  return values;
}

// Two branches, the first with batch statistics of `norm` and the second with given ones; only the first has a bias.
void run_join(const Case& t, const Memory& x_, const std::vector<double>& x, const Memory& other_,
              const std::vector<double>& other, const Memory& grad_, const std::vector<double>& grad, const Norm& norm,
              const Workspace& work) {
  const Shape shape{t.n, t.c, t.h * t.w, t.channels_last, t.dtype};
  const size_t size = x.size(), shift = t.shifted ? size_of(t.dtype) : 0;
  const double count = static_cast<double>(t.n * t.h * t.w), tolerance = epsilon(t.dtype);
  const auto channel = [&](size_t i) { return t.channels_last ? i % t.c : i / (t.h * t.w) % t.c; };
  std::vector<double> mean(t.c), var(t.c), other_mean(t.c, 0.25), other_var(t.c, 2.0);
  for (size_t i = 0; i < size; ++i) mean[channel(i)] += x[i] / count;
  for (size_t i = 0; i < size; ++i) var[channel(i)] += (x[i] - mean[channel(i)]) * (x[i] - mean[channel(i)]) / count;
  std::vector<float> weight(t.c);
  for (int64_t c = 0; c < t.c; ++c) weight[c] = 0.5f + c % 7 * 0.25f;
  const auto other_mean_ = upload(other_mean), other_var_ = upload(other_var);
  Norm other_norm = norm;
  other_norm.mean.data = other_mean_->data(), other_norm.var.data = other_var_->data();
  other_norm.weight.data = other_norm.bias.data = nullptr;
  const auto x_hat = [&](size_t i) { return (x[i] - mean[channel(i)]) / std::sqrt(var[channel(i)] + 1e-5); };
  const auto other_hat = [&](size_t i) { return (other[i] - 0.25) / std::sqrt(2.0 + 1e-5); };

  const int64_t rows = t.channels_last ? t.n * t.h * t.w : t.n * t.c,
                bytes = ((t.channels_last ? t.c : t.h * t.w) + 7) / 8;
  const Memory y_(size * size_of(t.dtype), shift), mask(rows * bytes);
  const Memory used_mean(t.c * sizeof(double)), used_var(t.c * sizeof(double));
  auto* bits = static_cast<uint8_t*>(mask.data());
  check(join(shape, {x_.data(), norm, nullptr, nullptr},
             {other_.data(), other_norm, static_cast<double*>(used_mean.data()), static_cast<double*>(used_var.data())},
             y_.data(), bits, true, kQueue),
        "join");
  std::vector<double> y(size), grad_weight(t.c), grad_bias(t.c), other_weight(t.c), grad_x(size), grad_other(size);
  for (size_t i = 0; i < size; ++i) {
    const float bias = channel(i) % 5 * 0.3f - 0.5f;
    y[i] = std::fmax(x_hat(i) * weight[channel(i)] + bias + other_hat(i), 0.0);
  }
  const std::vector<double> got_y = download(t.dtype, y_);  // whose zeros are where the mask has none
  expect(t, "joined", got_y, y, tolerance);
  expect(t, "used_mean of the other branch", download<double>(used_mean), other_mean, 0.0);
  const auto g = [&](size_t i) { return got_y[i] > 0.0 ? grad[i] : 0.0; };
  for (size_t i = 0; i < size; ++i) {
    const size_t c = channel(i);
    grad_bias[c] += g(i), grad_weight[c] += g(i) * x_hat(i), other_weight[c] += g(i) * other_hat(i);
  }
  for (size_t i = 0; i < size; ++i) {
    const size_t c = channel(i);
    grad_x[i] =
        weight[c] / std::sqrt(var[c] + 1e-5) * (g(i) - grad_bias[c] / count - x_hat(i) * grad_weight[c] / count);
    grad_other[i] = g(i) / std::sqrt(2.0 + 1e-5);
  }
  const Memory found[2][3] = {{Memory(t.c * 4), Memory(t.c * 4), Memory(3 * t.c * 4)},
                              {Memory(t.c * 4), Memory(t.c * 4), Memory(3 * t.c * 4)}};
  const Memory grad_x_(size * size_of(t.dtype), shift), grad_other_(size * size_of(t.dtype), shift);
  const auto reduced = [&](int i) {
    return Reduced{static_cast<float*>(found[i][0].data()), static_cast<float*>(found[i][1].data()),
                   static_cast<float*>(found[i][2].data()), nullptr};
  };
  const BranchGradient one{x_.data(), norm, true, reduced(0), grad_x_.data()},
      two{other_.data(), other_norm, false, reduced(1), grad_other_.data()};
  check(join_backward_reduce(shape, grad_.data(), bits, one, two, work, kQueue), "join_backward_reduce");
  check(join_backward_apply(shape, grad_.data(), bits, one, two, kQueue), "join_backward_apply");
  const std::vector<double>* want[2][2] = {{&grad_weight, &grad_bias}, {&other_weight, &grad_bias}};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const std::vector<float> got = download<float>(found[i][j]);
      expect(t, "gradients of weights and biases of the join", {got.begin(), got.end()}, *want[i][j], 1e-4);
    }
  }
  expect(t, "grad_x of the join", download(t.dtype, grad_x_), grad_x, 2 * tolerance);
  expect(t, "grad_other of the join", download(t.dtype, grad_other_), grad_other, 2 * tolerance);
}

void run(const Case& t) {
  const Shape shape{t.n, t.c, t.h * t.w, t.channels_last, t.dtype};
  const size_t size = t.n * t.c * t.h * t.w, shift = t.shifted ? size_of(t.dtype) : 0;
  const double count = static_cast<double>(t.n * t.h * t.w), tolerance = epsilon(t.dtype);
  const auto at = [&](int64_t n, int64_t c, int64_t h, int64_t w, int64_t height, int64_t width) -> size_t {
    return t.channels_last ? ((n * height + h) * width + w) * t.c + c : ((n * t.c + c) * height + h) * width + w;
  };
  const auto channel = [&](size_t i) { return t.channels_last ? i % t.c : i / (t.h * t.w) % t.c; };
  const auto activation = [&](size_t values) { return Memory(values * size_of(t.dtype), shift); };

  std::vector<double> x = random_values(size, 1, 3.0), residual = random_values(size, 2), grad = random_values(size, 3);
  const auto x_ = upload(t.dtype, &x, shift), residual_ = upload(t.dtype, &residual, shift),
             grad_ = upload(t.dtype, &grad, shift);
  std::vector<float> weight(t.c), bias(t.c);
  for (int64_t c = 0; c < t.c; ++c) weight[c] = 0.5f + c % 7 * 0.25f, bias[c] = c % 5 * 0.3f - 0.5f;
  const auto weight_ = upload(weight), bias_ = upload(bias);
  const Memory partial(Workspace::floats(shape, kQueue, 3) * sizeof(float));
  const auto tickets = upload(std::vector<unsigned>(Workspace::counters(shape)));
  const Workspace work{static_cast<float*>(partial.data()), static_cast<unsigned*>(tickets->data())};

  std::vector<double> mean(t.c), var(t.c);
  for (size_t i = 0; i < size; ++i) mean[channel(i)] += x[i] / count;
  for (size_t i = 0; i < size; ++i) var[channel(i)] += (x[i] - mean[channel(i)]) * (x[i] - mean[channel(i)]) / count;
  const Memory mean_(t.c * sizeof(double)), var_(t.c * sizeof(double));
  auto* mean_data = static_cast<double*>(mean_.data());
  auto* var_data = static_cast<double*>(var_.data());
  check(statistics(shape, x_->data(), mean_data, var_data, work, kQueue), "statistics");
  expect(t, "mean", download<double>(mean_), mean, 1e-6);
  expect(t, "var", download<double>(var_), var, 1e-5);

  std::vector<float> running(t.c, 1.0f);
  const auto running_mean = upload(running), running_var = upload(running);
  std::vector<float> other(5, 1.0f);  // a second layer, which has fewer channels
  const auto other_mean = upload(other), other_var = upload(other);
  const Update updates[] = {
      {{running_mean->data(), running_var->data(), Dtype::kFloat, 1, 1}, mean_data, var_data, nullptr, 0.1, t.c, 7},
      {{other_mean->data(), other_var->data(), Dtype::kFloat, 1, 1},
       mean_data,
       var_data,
       nullptr,
       1.0,
       t.c < 5 ? t.c : 5,
       7}};
  check(update_running_stats(updates, 2, kQueue), "update_running_stats");
  std::vector<double> want(t.c), got;
  for (int64_t c = 0; c < t.c; ++c) want[c] = 0.9 + 0.1 * mean[c];
  running = download<float>(*running_mean);
  expect(t, "running_mean", {running.begin(), running.end()}, want, 1e-6);
  other = download<float>(*other_mean);
  std::vector<double> replaced(5, 1.0);
  for (int64_t c = 0; c < 5 && c < t.c; ++c) replaced[c] = mean[c];
  expect(t, "running_mean of the second layer", {other.begin(), other.end()}, replaced, 1e-6);

  const Norm norm{{mean_data, Dtype::kDouble},
                  {var_data, Dtype::kDouble},
                  {weight_->data(), Dtype::kFloat},
                  {bias_->data(), Dtype::kFloat},
                  1e-5};
  const auto normalised = [&](size_t i) {
    const size_t c = channel(i);
    return (x[i] - mean[c]) / std::sqrt(var[c] + 1e-5) * weight[c] + bias[c];
  };
  const int64_t rows = t.channels_last ? t.n * t.h * t.w : t.n * t.c,
                bytes = ((t.channels_last ? t.c : t.h * t.w) + 7) / 8;
  const Memory y_ = activation(size), mask(rows * bytes);
  const Memory used_mean(t.c * sizeof(double)), used_var(t.c * sizeof(double));
  check(apply(shape, norm,
              {x_->data(), residual_->data(), y_.data(), static_cast<uint8_t*>(mask.data()),
               static_cast<double*>(used_mean.data()), static_cast<double*>(used_var.data()), true},
              kQueue),
        "apply");
  std::vector<double> y(size), g(size);
  for (size_t i = 0; i < size; ++i) y[i] = std::fmax(normalised(i) + residual[i], 0.0);
  expect(t, "y", download(t.dtype, y_), y, tolerance);
  expect(t, "used_mean", download<double>(used_mean), mean, 1e-6);

  const std::vector<double> got_y = download(t.dtype, y_);  // whose zeros are where the mask has none
  for (size_t i = 0; i < size; ++i) g[i] = got_y[i] > 0.0 ? grad[i] : 0.0;
  std::vector<double> grad_bias(t.c), grad_weight(t.c), grad_x(size);
  const auto x_hat = [&](size_t i) { return (x[i] - mean[channel(i)]) / std::sqrt(var[channel(i)] + 1e-5); };
  const auto differentiate = [&](const std::vector<double>& from) {
    grad_bias.assign(t.c, 0.0);
    grad_weight.assign(t.c, 0.0);
    for (size_t i = 0; i < size; ++i) grad_bias[channel(i)] += from[i], grad_weight[channel(i)] += from[i] * x_hat(i);
    for (size_t i = 0; i < size; ++i) {
      const size_t c = channel(i);
      grad_x[i] =
          weight[c] / std::sqrt(var[c] + 1e-5) * (from[i] - grad_bias[c] / count - x_hat(i) * grad_weight[c] / count);
    }
  };
  differentiate(g);
  const Memory grad_weight_(t.c * 4), grad_bias_(t.c * 4), factors(3 * t.c * 4), masked = activation(size);
  const Reduced reduced{static_cast<float*>(grad_weight_.data()), static_cast<float*>(grad_bias_.data()),
                        static_cast<float*>(factors.data()), masked.data()};
  const auto gradients = [&](const char* of) {
    const std::vector<float> w = download<float>(grad_weight_), b = download<float>(grad_bias_);
    expect(t, of, {w.begin(), w.end()}, grad_weight, 1e-4);
    expect(t, of, {b.begin(), b.end()}, grad_bias, 1e-4);
  };
  Gradient gradient{grad_->data(), x_->data(), static_cast<const uint8_t*>(mask.data()), Relu::kMasked, true};
  check(backward_reduce(shape, norm, gradient, reduced, work, kQueue), "backward_reduce");
  gradients("gradients of weight and bias");
  expect(t, "masked", download(t.dtype, masked), g, 0.0);
  const Memory grad_x_ = activation(size);
  check(backward_apply(shape, norm, gradient, reduced.factors, grad_x_.data(), kQueue), "backward_apply");
  expect(t, "grad_x", download(t.dtype, grad_x_), grad_x, 2 * tolerance);

  if (!t.shifted && fits_on_chip(shape, true, kSmall)) {
    const Memory sums(Workspace::floats(shape, kSmall, 2) * sizeof(float));
    const Workspace room{static_cast<float*>(sums.data()), work.tickets};
    const Memory mean_of(t.c * sizeof(double)), var_of(t.c * sizeof(double)),
        y_of = activation(size), masked_of = activation(size), grad_x_of = activation(size);
    auto *means = static_cast<double*>(mean_of.data()), *vars = static_cast<double*>(var_of.data());
    check(persistent(
              shape, {{}, {}, norm.weight, norm.bias, norm.eps},
              {x_->data(), residual_->data(), y_of.data(), static_cast<uint8_t*>(mask.data()), nullptr, nullptr, true},
              means, vars, room, kSmall),
          "persistent");
    expect(t, "mean on the chip", download<double>(mean_of), mean, 1e-6);
    expect(t, "var on the chip", download<double>(var_of), var, 1e-5);
    expect(t, "y on the chip", download(t.dtype, y_of), y, tolerance);
    check(persistent_backward(shape, norm, gradient,
                              {reduced.grad_weight, reduced.grad_bias, reduced.factors, masked_of.data()},
                              grad_x_of.data(), room, kSmall),
          "persistent_backward");
    gradients("gradients of weight and bias on the chip");
    expect(t, "masked on the chip", download(t.dtype, masked_of), g, 0.0);
    expect(t, "grad_x on the chip", download(t.dtype, grad_x_of), grad_x, 2 * tolerance);
  }

  run_join(t, *x_, x, *residual_, residual, *grad_, grad, norm, work);

  check(add_act(t.dtype, size, x_->data(), residual_->data(), y_.data(), true, kQueue), "add_act");
  for (size_t i = 0; i < size; ++i) y[i] = std::fmax(x[i] + residual[i], 0.0);
  expect(t, "sum", download(t.dtype, y_), y, tolerance);
  check(add_act_backward(t.dtype, size, grad_->data(), y_.data(), grad_x_.data(), kQueue), "add_act_backward");
  got = download(t.dtype, y_);
  for (size_t i = 0; i < size; ++i) g[i] = got[i] > 0.0 ? grad[i] : 0.0;
  expect(t, "gradient of the sum", download(t.dtype, grad_x_), g, 0.0);

  const Window window{t.h, t.w, (t.h - 1) / 2 + 1, (t.w - 1) / 2 + 1, 3, 2, 1};
  const size_t pooled = t.n * t.c * window.out_height * window.out_width;
  const Memory pooled_ = activation(pooled), index(pooled);
  check(maxpool(shape, window, norm,
                {x_->data(), pooled_.data(), static_cast<uint8_t*>(index.data()), nullptr, nullptr, true}, kQueue),
        "maxpool");
  std::vector<double> best(pooled), pool_grad = random_values(pooled, 4);
  const auto pool_grad_ = upload(t.dtype, &pool_grad, shift);
  const std::vector<uint8_t> places = download<uint8_t>(index);
  g.assign(size, 0.0);
  for (int64_t n = 0; n < t.n; ++n) {
    for (int64_t c = 0; c < t.c; ++c) {
      for (int64_t h = 0; h < window.out_height; ++h) {
        for (int64_t w = 0; w < window.out_width; ++w) {
          double largest = 0.0;
          for (int64_t i = 2 * h - 1; i <= 2 * h + 1; ++i) {
            for (int64_t j = 2 * w - 1; j <= 2 * w + 1; ++j) {
              if (i < 0 || j < 0 || i >= t.h || j >= t.w) continue;
              largest = std::fmax(largest, normalised(at(n, c, i, j, t.h, t.w)));
            }
          }
          const size_t out = at(n, c, h, w, window.out_height, window.out_width);
          best[out] = largest;
          const size_t from = at(n, c, 2 * h - 1 + places[out] / 3, 2 * w - 1 + places[out] % 3, t.h, t.w);
          if (from < size && largest > 0.0) g[from] += pool_grad[out];
        }
      }
    }
  }
  expect(t, "pooled", download(t.dtype, pooled_), best, tolerance);
  differentiate(g);
  gradient = {pool_grad_->data(), x_->data(), nullptr, Relu::kRecomputed, true};
  const auto* index_data = static_cast<const uint8_t*>(index.data());
  const Reduced pool_reduced{reduced.grad_weight, reduced.grad_bias, reduced.factors, nullptr};
  check(maxpool_backward_reduce(shape, window, norm, gradient, index_data, pool_reduced, work, kQueue),
        "maxpool_backward_reduce");
  gradients("gradients of weight and bias under the pool");
  check(maxpool_backward_apply(shape, window, norm, gradient, index_data, reduced.factors, grad_x_.data(), kQueue),
        "maxpool_backward_apply");
  expect(t, "grad_x under the pool", download(t.dtype, grad_x_), grad_x, 2 * tolerance);
  for (unsigned ticket : download<unsigned>(*tickets)) failures += ticket != 0;
}

}  // namespace

// few: what TSan has time for, in one dtype; every kernel in all four forms, with several blocks.
int main(int count, char** arguments) {
  check(available(), "the device");
  if (count > 1 && std::strcmp(arguments[1], "few") == 0) {
    run({3, 13, 15, 7, true, false, Dtype::kBFloat16});
    run({3, 16, 15, 7, true, false, Dtype::kBFloat16});
    run({3, 2, 15, 7, false, false, Dtype::kBFloat16});
    run({9, 2, 16, 16, false, false, Dtype::kBFloat16});
  } else {
    const int64_t shapes[][4] = {{2, 16, 4, 6}, {1, 13, 5, 3}, {3, 40, 8, 8}};
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf}) {
      for (const bool channels_last : {false, true}) {
        for (const auto& s : shapes) run({s[0], s[1], s[2], s[3], channels_last, false, dtype});
        const auto& s = shapes[0];
        run({s[0], s[1], s[2], s[3], channels_last, true, dtype});  // no multiple of 16
      }
    }
  }
  std::printf(failures ? "%d failures\n" : "all kernels are right\n", failures);
  return failures != 0;
}
