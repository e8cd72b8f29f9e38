// Kernels of gram.h for one instruction set.

typedef double vd __attribute__((vector_size(W * 4)));  // one register
typedef float vf_half __attribute__((vector_size(W * 2)));

constexpr int kHalf = W / 2;
constexpr int kGramRows = 6;  // of W sums each

FASTRES_INLINE vd load(const double* p) {
  vd v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTRES_INLINE void store(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }

// sums[r][] = sum over k of *(a[r] + k * step) * b[k][], W of them
FASTRES_INLINE void gram_tile(const double* const* a, int64_t step, const double* b, int64_t depth,
                              double sums[kGramRows][W]) {
  const double *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  vd s[kGramRows][2] = {};
  for (int64_t k = 0; k < depth; ++k, b += W) {
    const vd low = load(b), high = load(b + kHalf);
    const double values[kGramRows] = {a0[k * step], a1[k * step], a2[k * step],
                                      a3[k * step], a4[k * step], a5[k * step]};
#pragma GCC unroll 6
    for (int r = 0; r < kGramRows; ++r) {
      s[r][0] += values[r] * low;
      s[r][1] += values[r] * high;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kGramRows; ++r) {
    store(sums[r], s[r][0]);
    store(sums[r] + kHalf, s[r][1]);
  }
}

// The values lie in slabs of W channels, [slab][pixel][W], from which both factors are read.
static void moments(const float* x, int64_t channels, const double* point, int64_t count, double* scratch,
                    double* first, double* second) {
  const int64_t slabs = (channels + W - 1) / W, padded = slabs * W;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t valid = channels - slab * W < W ? channels - slab * W : W;
    double from[W] = {}, sum[W];
    for (int64_t i = 0; i < valid; ++i) from[i] = point[slab * W + i];
    const vd origins[2] = {load(from), load(from + kHalf)};
    vd sums[2] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* values = x + i * channels + slab * W;
      float buffer[W] = {};  // lanes without a channel are zeros, as is their origin
      if (valid < W) {
        __builtin_memcpy(buffer, values, valid * sizeof(float));
        values = buffer;
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vf_half v;
        __builtin_memcpy(&v, values + half * kHalf, sizeof v);
        const vd d = __builtin_convertvector(v, vd) - origins[half];
        sums[half] += d;
        store(scratch + (slab * count + i) * W + half * kHalf, d);
      }
    }
    store(sum, sums[0]);
    store(sum + kHalf, sums[1]);
    for (int64_t i = 0; i < valid; ++i) first[slab * W + i] += sum[i];
  }
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t rows = (slab + 1) * W;
    for (int64_t row = 0; row < rows; row += kGramRows) {
      const double* a[kGramRows];
      for (int64_t r = 0; r < kGramRows; ++r) {
        const int64_t channel = row + r < rows ? row + r : 0;
        a[r] = scratch + channel / W * count * W + channel % W;
      }
      double sums[kGramRows][W];
      gram_tile(a, W, scratch + slab * count * W, count, sums);
      for (int64_t r = 0; r < kGramRows && row + r < rows; ++r) {
        double* place = second + (row + r) * padded + slab * W;
        for (int i = 0; i < W; ++i) place[i] += sums[r][i];
      }
    }
  }
}

// Slab after slab of W columns, of each the rows up to its last column: twice what is above the diagonal, nothing below.
static void pack_covariance(const double* covariance, int64_t channels, double* packed) {
  for (int64_t slab = 0; slab < (channels + W - 1) / W; ++slab) {
    for (int64_t row = 0; row < (slab + 1) * W; ++row, packed += W) {
      for (int64_t i = 0; i < W; ++i) {
        const int64_t column = slab * W + i;
        const bool inside = row <= column && column < channels;
        packed[i] = inside ? covariance[row * channels + column] * (row < column ? 2.0 : 1.0) : 0.0;
      }
    }
  }
}

static void quadratic_forms(const float* weight, int64_t channels, const double* packed, int64_t begin, int64_t end,
                            double* out) {
  constexpr int64_t kBlock = 512;  // rows of a slab at a time, so that the six rows' values fit on the stack
  const int64_t slabs = (channels + W - 1) / W;
  double values[kGramRows][kBlock] = {};
  for (int64_t row = begin; row < end; row += kGramRows) {
    const int64_t rows = end - row < kGramRows ? end - row : kGramRows;
    for (int64_t r = 0; r < rows; ++r) out[row + r] = 0;
    for (int64_t first = 0; first < slabs * W; first += kBlock) {
      const int64_t last = first + kBlock < slabs * W ? first + kBlock : slabs * W;
      const double* a[kGramRows];
      for (int64_t r = 0; r < kGramRows; ++r) {
        a[r] = values[r];
        for (int64_t k = first; r < rows && k < last; ++k) {
          values[r][k - first] = k < channels ? weight[(row + r) * channels + k] : 0.0;
        }
      }
      for (int64_t slab = first / W; slab < slabs; ++slab) {
        const int64_t depth = ((slab + 1) * W < last ? (slab + 1) * W : last) - first;
        double sums[kGramRows][W];
        gram_tile(a, 1, packed + W * (W * slab * (slab + 1) / 2 + first), depth, sums);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < W && slab * W + i < channels; ++i) {
            out[row + r] += sums[r][i] * weight[(row + r) * channels + slab * W + i];
          }
        }
      }
    }
  }
}

template <class T>
static void mask_of_relu(const void* y, int64_t channels, int64_t begin, int64_t end, uint8_t* mask) {
  for (int64_t run = begin; run < end; ++run) {
    const T* values = static_cast<const T*>(y) + run * channels;
    uint8_t* bits = mask + run * ((channels + 7) / 8);
    for_each_vector(channels, [&](int64_t i, auto n) { store_bits(bits, i, ~(load(values + i, n) <= 0.0f), n); });
  }
}

constexpr GramKernels gram_table = {
    W, moments, pack_covariance, quadratic_forms, {mask_of_relu<float>, mask_of_relu<BF16>, mask_of_relu<F16>}};
