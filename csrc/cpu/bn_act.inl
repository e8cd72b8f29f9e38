// Kernels of bn_act.h for one instruction set.
#include "reduce.inl"

template <class T, bool kChannelsLast>
struct StatisticsSource {
  using Row = const T*;
  const BnAct& p;
  FASTRES_INLINE_MEMBER Row row(int64_t run) const { return static_cast<const T*>(p.x) + run * p.length; }
  template <class N>
  FASTRES_INLINE_MEMBER void terms(Row x, int64_t channel, int64_t i, N n, vf* a, vf* b) const {
    vf d = load(x + i, n) - parameter<kChannelsLast>(p.mean, channel, i);
    if (n.n < W) d = select(first_lanes(n.n), d, vf{});
    *a = d;
    *b = d * d;
  }
};

// g = grad_y where the ReLU let the value through. kMask: the sign of z comes from the mask, else it is recomputed.
template <class T, bool kChannelsLast, bool kMask>
struct GradientSource {
  struct Row {
    const T *x, *grad_y;
    const uint8_t* mask;
    T* grad_residual;
  };
  const BnAct& p;
  FASTRES_INLINE_MEMBER Row row(int64_t run) const {
    T* grad_residual = static_cast<T*>(p.grad_residual);
    return {static_cast<const T*>(p.x) + run * p.length, static_cast<const T*>(p.grad_y) + run * p.length,
            kMask ? p.mask + run * p.mask_stride : nullptr, grad_residual ? grad_residual + run * p.length : nullptr};
  }
  template <class N>
  FASTRES_INLINE_MEMBER vf gradient(const Row& row, int64_t channel, int64_t i, N n, vf centred) const {
    const vf grad = load(row.grad_y + i, n);
    vi keep;
    if (kMask) {
      keep = load_bits(row.mask, i, n);
    } else if (p.relu) {
      const vf z =
          centred * parameter<kChannelsLast>(p.scale, channel, i) + parameter<kChannelsLast>(p.shift, channel, i);
      keep = ~(z <= 0.0f);  // NaN passes, as in eager
    } else {
      return grad;
    }
    return select(keep, grad, vf{});
  }
  template <class N>
  FASTRES_INLINE_MEMBER void terms(const Row& row, int64_t channel, int64_t i, N n, vf* a, vf* b) const {
    const vf centred = load(row.x + i, n) - parameter<kChannelsLast>(p.mean, channel, i);
    vf g = gradient(row, channel, i, n, centred);
    if (row.grad_residual) store(row.grad_residual + i, g, n);
    *a = g;
    *b = g * centred;  // a tail's spare lanes: g is 0 there
    if (n.n < W) *b = select(first_lanes(n.n), *b, vf{});
  }
};

template <class T, bool kChannelsLast>
void statistics(const BnAct& p, int64_t begin, int64_t end, double* sum1, double* sum2) {
  const StatisticsSource<T, kChannelsLast> source{p};
  if (kChannelsLast) {
    reduce_channels_last(source, p.channels, begin, end, sum1, sum2);
  } else {
    reduce_contiguous(source, p.runs / p.channels, p.channels, p.length, begin, end, sum1, sum2);
  }
}

template <class T, bool kChannelsLast, bool kResidual>
void apply_runs(const BnAct& p, int64_t begin, int64_t end) {
  const vf floor = splat(p.relu ? 0.0f : -__builtin_inff());
  for (int64_t run = begin; run < end; ++run) {
    const T* x = static_cast<const T*>(p.x) + run * p.length;
    const T* residual = kResidual ? static_cast<const T*>(p.residual) + run * p.length : nullptr;
    T* y = static_cast<T*>(p.y) + run * p.length;
    uint8_t* mask = p.mask ? p.mask + run * p.mask_stride : nullptr;
    const int64_t channel = kChannelsLast ? 0 : run % p.channels;
    for_each_vector(p.length, [&](int64_t i, auto n) {
      vf z = (load(x + i, n) - parameter<kChannelsLast>(p.mean, channel, i)) *
                 parameter<kChannelsLast>(p.scale, channel, i) +
             parameter<kChannelsLast>(p.shift, channel, i);
      if (kResidual) {
        z += load(residual + i, n);
        if (mask) store_bits(mask, i, ~(z <= 0.0f), n);
      }
      store(y + i, at_least(floor, z), n);  // NaN < 0 is false: NaN stays
    });
  }
}

template <class T, bool kChannelsLast>
void apply(const BnAct& p, int64_t begin, int64_t end) {
  (p.residual ? apply_runs<T, kChannelsLast, true> : apply_runs<T, kChannelsLast, false>)(p, begin, end);
}

template <class T, bool kChannelsLast, bool kMask>
void backward_reduce_runs(const BnAct& p, int64_t begin, int64_t end, double* sum1, double* sum2) {
  const GradientSource<T, kChannelsLast, kMask> source{p};
  if (kChannelsLast) {
    reduce_channels_last(source, p.channels, begin, end, sum1, sum2);
  } else {
    reduce_contiguous(source, p.runs / p.channels, p.channels, p.length, begin, end, sum1, sum2);
  }
}

template <class T, bool kChannelsLast>
void backward_reduce(const BnAct& p, int64_t begin, int64_t end, double* sum1, double* sum2) {
  (p.mask ? backward_reduce_runs<T, kChannelsLast, true> : backward_reduce_runs<T, kChannelsLast, false>)(p, begin, end,
                                                                                                          sum1, sum2);
}

template <class T, bool kChannelsLast, bool kMask>
void backward_apply_runs(const BnAct& p, int64_t begin, int64_t end) {
  const GradientSource<T, kChannelsLast, kMask> source{p};
  for (int64_t run = end - 1; run >= begin;
       --run) {  // the reduction came from the front: its last runs are still cached
    const auto row = source.row(run);
    T* grad_x = static_cast<T*>(p.y) + run * p.length;
    const int64_t channel = kChannelsLast ? 0 : run % p.channels;
    for_each_vector(p.length, [&](int64_t i, auto n) {
      const vf centred = load(row.x + i, n) - parameter<kChannelsLast>(p.mean, channel, i);
      const vf g = source.gradient(row, channel, i, n, centred);
      store(grad_x + i, input_gradient<kChannelsLast>(p, channel, i, centred, g), n);
    });
  }
}

template <class T, bool kChannelsLast>
void backward_apply(const BnAct& p, int64_t begin, int64_t end) {
  (p.mask ? backward_apply_runs<T, kChannelsLast, true> : backward_apply_runs<T, kChannelsLast, false>)(p, begin, end);
}

template <class T, bool kChannelsLast>
constexpr BnActKernels kernels_of() {
  return {statistics<T, kChannelsLast>, apply<T, kChannelsLast>, backward_reduce<T, kChannelsLast>,
          backward_apply<T, kChannelsLast>};
}
constexpr BnActKernels bn_act_table[3][2] = {{kernels_of<float, false>(), kernels_of<float, true>()},
                                             {kernels_of<BF16, false>(), kernels_of<BF16, true>()},
                                             {kernels_of<F16, false>(), kernels_of<F16, true>()}};
