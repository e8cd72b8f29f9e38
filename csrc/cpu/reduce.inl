// Per-channel parameters and two-sum reductions, shared by the batch-norm kernels.

// The parameter of the channels at i of a run: a vector along an NHWC run, one value all over an NCHW run.
template <bool kChannelsLast>
FASTRES_INLINE vf parameter(const float* p, int64_t channel, int64_t i) {
  return kChannelsLast ? load(p + i) : splat(p[channel]);
}

// grad_x of values whose masked gradient is g. With running statistics (no slope) x has no part in it: a NaN there stays there.
template <bool kChannelsLast, class Args>
FASTRES_INLINE vf input_gradient(const Args& p, int64_t channel, int64_t i, vf centred, vf g) {
  vf grad_x = g * parameter<kChannelsLast>(p.scale, channel, i);
  if (p.slope) {
    grad_x += centred * parameter<kChannelsLast>(p.slope, channel, i) + parameter<kChannelsLast>(p.offset, channel, i);
  }
  return grad_x;
}

FASTRES_INLINE void add_to(double* sum, vf v, int64_t n) {
  float lanes[W];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) sum[i] += lanes[i];
}

constexpr int kRows =
    16;  // values added in fp32 before they go to double: keeps the sums' error near one fp32 rounding

// Source: row(run) -> what a run needs; terms(row, channel, i, n, &a, &b) -> the two terms of the values at i.
// NHWC: kRows runs at a time, so that the sums of a vector of channels stay in registers.
template <class Source>
FASTRES_INLINE void reduce_channels_last(const Source& source, int64_t channels, int64_t begin, int64_t end,
                                         double* sum1, double* sum2) {
  typename Source::Row rows[kRows];
  for (int64_t run = begin; run < end; run += kRows) {
    const int count = static_cast<int>(end - run < kRows ? end - run : kRows);
    for (int r = 0; r < count; ++r) rows[r] = source.row(run + r);
    for_each_vector(channels, [&](int64_t i, auto n) {
      vf total1{}, total2{}, a, b;
      for (int r = 0; r < count; ++r) {
        source.terms(rows[r], 0, i, n, &a, &b);
        total1 += a;
        total2 += b;
      }
      add_to(sum1 + i, total1, n.n);
      add_to(sum2 + i, total2, n.n);
    });
  }
}

// NCHW: channels [begin, end), all images of each.
template <class Source>
FASTRES_INLINE void reduce_contiguous(const Source& source, int64_t images, int64_t channels, int64_t length,
                                      int64_t begin, int64_t end, double* sum1, double* sum2) {
  for (int64_t channel = begin; channel < end; ++channel) {
    double lanes1[W] = {}, lanes2[W] = {};
    for (int64_t image = 0; image < images; ++image) {
      const typename Source::Row row = source.row(image * channels + channel);
      for (int64_t block = 0; block < length; block += kRows * W) {
        const int64_t size = length - block < kRows * W ? length - block : kRows * W;
        vf total1{}, total2{}, a, b;
        for_each_vector(size, [&](int64_t i, auto n) {
          source.terms(row, channel, block + i, n, &a, &b);
          total1 += a;
          total2 += b;
        });
        add_to(lanes1, total1, W);
        add_to(lanes2, total2, W);
      }
    }
    for (int i = 0; i < W; ++i) {
      sum1[channel] += lanes1[i];
      sum2[channel] += lanes2[i];
    }
  }
}
