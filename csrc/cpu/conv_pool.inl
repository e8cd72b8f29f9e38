// One row of max-pooling of NHWC values, for conv_maxpool.cpp. As in ATen's max_pool2d a NaN always wins.
template <class T>
static void max_pool_row(const MaxPool& p, const float* x, int64_t rows, void* y) {
  for (int64_t out = 0; out < p.out_width; ++out) {
    const int64_t start = out * p.stride - p.padding, end = start + p.kernel;
    const int64_t first = start < 0 ? 0 : start, last = end < p.width ? end : p.width;
    for_each_vector(p.channels, [&](int64_t i, auto n) {
      vf best = splat(-__builtin_inff());
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t w = first; w < last; ++w) {
          const vf value = load(x + (row * p.width + w) * p.channels + i, n);
          best = select((value > best) | (value != value), value, best);
        }
      }
      store(static_cast<T*>(y) + out * p.channels + i, best, n);
    });
  }
}

constexpr MaxPoolRow max_pool_row_table[3] = {max_pool_row<float>, max_pool_row<BF16>, max_pool_row<F16>};
