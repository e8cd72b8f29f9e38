// The register tile of all convolutions: R rows (output pixels) x NV vectors of output channels.

constexpr int kTileRows = 6;
constexpr int kTileVectors = FASTRES_LEVEL >= 2 ? 4 : 2;  // 12 sums of 16 registers, 24 of 32
constexpr int kPanel = kTileVectors * W;

// Weights are fetched so many input channels before they are used: at batch 1 they come from memory, and networks ran 5 to 7 %
// faster with it (Zen 3). At batch 16 it makes no difference or costs a per cent.
constexpr int64_t kAhead = 128;

// sums[r][v] = sum over taps and first <= k < last of rows[tap * row_stride + r][k] * b[tap][k][v]; then finish(r, v, sum).
template <int R, int NV, class Finish>
FASTRES_INLINE void tile(const float* const* rows, int64_t row_stride, int64_t taps, int64_t first, int64_t last,
                         const float* b, const Finish& finish) {
  vf sums[R][NV] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = rows[tap * row_stride + r];
    for (int64_t k = first; k < last; ++k, b += NV * W) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 16 / W) __builtin_prefetch(b + (kAhead * NV + v) * W);
      vf column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf value = splat(a[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] += value * column[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) finish(r, v, sums[r][v]);
  }
}

// f(first, rows) for `count` rows cut into tiles of nearly equal height: a last tile of one or two rows would run at a fraction of
// the speed, because it has too few sums to hide the latency of an addition.
template <class F>
FASTRES_INLINE void for_each_tile(int64_t count, const F& f) {
  const int64_t tiles = (count + kTileRows - 1) / kTileRows, rows = tiles == 0 ? 0 : count / tiles;
  const int64_t higher = count - tiles * rows;  // so many tiles have a row more
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int64_t height = rows + (i < higher);
    f(first, height);
    first += height;
  }
}

template <int NV, class Finish>
FASTRES_INLINE void tile_of_rows(int64_t count, const float* const* rows, int64_t row_stride, int64_t taps,
                                 int64_t first, int64_t last, const float* b, const Finish& finish) {
  static_assert(kTileRows == 6);
  switch (count) {
    case 1: return tile<1, NV>(rows, row_stride, taps, first, last, b, finish);
    case 2: return tile<2, NV>(rows, row_stride, taps, first, last, b, finish);
    case 3: return tile<3, NV>(rows, row_stride, taps, first, last, b, finish);
    case 4: return tile<4, NV>(rows, row_stride, taps, first, last, b, finish);
    case 5: return tile<5, NV>(rows, row_stride, taps, first, last, b, finish);
    default: return tile<6, NV>(rows, row_stride, taps, first, last, b, finish);
  }
}

// Whether a sum of values times 0 is 0: then all of them were finite.
FASTRES_INLINE bool all_finite(vf check) {
  for (int i = 0; i < W; ++i) {
    if (check[i] != check[i]) return false;
  }
  return true;
}

// f(std::integral_constant-like Vectors<NV>) for a panel of NV vectors.
template <int NV>
struct Vectors {
  static constexpr int n = NV;
};
template <class F>
FASTRES_INLINE void with_vectors(int64_t vectors, const F& f) {
#if FASTRES_LEVEL >= 2
  if (vectors == 4) return f(Vectors<4>{});
  if (vectors == 3) return f(Vectors<3>{});
#endif
  if (vectors == 2) return f(Vectors<2>{});
  f(Vectors<1>{});
}

FASTRES_INLINE vf finite_or_zero(vf z) { return select((z - z) == 0.0f, z, vf{}); }

FASTRES_INLINE int64_t panel_vectors(int64_t channels, int64_t panel) {
  const int64_t left = (channels - panel * kPanel + W - 1) / W;
  return left < kTileVectors ? left : kTileVectors;
}
