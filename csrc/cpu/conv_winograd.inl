// Winograd's F(MxM, 3x3) of conv.h for one instruction set: N = M + 2 values a side of a transformed tile.

typedef double vd __attribute__((vector_size(W * 8)));

constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;

// The transforms of one dimension; they are applied to rows and then to columns.
template <int M>
struct Transform;

// Points 0, +-a = sqrt(1/2), +-b = sqrt(2), infinity:
//   input    B^T d = [d0 - 2.5 d2 + d4, e1 + o1, e1 - o1, e2 + o2, e2 - o2, d1 - 2.5 d3 + d5]
//            e1 = d4 - 2 d2, o1 = a (d3 - 2 d1), e2 = d4 - d2 / 2, o2 = b (d3 - d1 / 2)
//   weight   G g   = [g0, (g0 +- a g1 + g2 / 2) / -1.5, (g0 +- b g1 + 2 g2) / 6, g2]
//   output   A^T m = [m0 + s1 + s2, a d1 + b d2, s1 / 2 + 2 s2, a^3 d1 + b^3 d2 + m5]
//            s1 = m1 + m2, d1 = m1 - m2, s2 = m3 + m4, d2 = m3 - m4
template <>
struct Transform<4> {
  FASTRES_INLINE void input(const vf* d, vf* o) {
    const vf e1 = d[4] - 2.0f * d[2], t1 = d[3] - 2.0f * d[1];
    const vf e2 = d[4] - 0.5f * d[2], t2 = d[3] - 0.5f * d[1];
    o[0] = d[0] - 2.5f * d[2] + d[4];
    o[1] = e1 + static_cast<float>(kA) * t1;
    o[2] = e1 - static_cast<float>(kA) * t1;
    o[3] = e2 + static_cast<float>(kB) * t2;
    o[4] = e2 - static_cast<float>(kB) * t2;
    o[5] = d[1] - 2.5f * d[3] + d[5];
  }
  FASTRES_INLINE void output(const vf* m, vf* o) {
    const vf s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    o[0] = m[0] + s1 + s2;
    o[1] = static_cast<float>(kA) * d1 + static_cast<float>(kB) * d2;
    o[2] = 0.5f * s1 + 2.0f * s2;
    o[3] = static_cast<float>(kA * kA * kA) * d1 + static_cast<float>(kB * kB * kB) * d2 + m[5];
  }
  FASTRES_INLINE void weight(const vd* g, vd* o) {
    const vd even1 = g[0] + 0.5 * g[2], odd1 = kA * g[1], even2 = g[0] + 2.0 * g[2], odd2 = kB * g[1];
    o[0] = g[0];
    o[1] = (even1 + odd1) * (-1 / 1.5);
    o[2] = (even1 - odd1) * (-1 / 1.5);
    o[3] = (even2 + odd2) * (1 / 6.0);
    o[4] = (even2 - odd2) * (1 / 6.0);
    o[5] = g[2];
  }
  static constexpr double kMiddle = -1.5 / (2 * kA);  // g1 = (u1 - u2) * kMiddle
};

// Points 0, +-1, infinity:
//   input    B^T d = [d0 - d2, d2 + d1, d2 - d1, d3 - d1]
//   weight   G g   = [g0, (g0 +- g1 + g2) / 2, g2]
//   output   A^T m = [m0 + m1 + m2, m1 - m2 + m3]
template <>
struct Transform<2> {
  FASTRES_INLINE void input(const vf* d, vf* o) {
    o[0] = d[0] - d[2];
    o[1] = d[2] + d[1];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  }
  FASTRES_INLINE void output(const vf* m, vf* o) {
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] + m[3];
  }
  FASTRES_INLINE void weight(const vd* g, vd* o) {
    const vd even = g[0] + g[2];
    o[0] = g[0];
    o[1] = 0.5 * (even + g[1]);
    o[2] = 0.5 * (even - g[1]);
    o[3] = g[2];
  }
  static constexpr double kMiddle = 1;
};

// A block of W x W weights of one tap: block[c][k], read along the dimension that lies together in memory.
FASTRES_INLINE void load_block(const float* from, int64_t stride_k, int64_t stride_c, float* block) {
  if (stride_k == 1) {
    for (int64_t c = 0; c < W; ++c) store(block + c * W, load(from + c * stride_c));
  } else {
    for (int64_t k = 0; k < W; ++k) {
      for (int64_t c = 0; c < W; ++c) block[c * W + k] = from[k * stride_k + c * stride_c];
    }
  }
}

template <int M>
static bool winograd_pack(const WeightView& w, int64_t index, float* packed) {
  constexpr int N = M + 2;
  const int64_t first = index * kPanel, vectors = panel_vectors(w.out_channels, index), columns = vectors * W;
  const int64_t plane = winograd_plane(w.in_channels, columns);
  float* panel = packed + index * N * N * winograd_plane(w.in_channels, kPanel);
  float blocks[9][W * W];
  vf check{};
  for (int64_t c0 = 0; c0 < w.in_channels; c0 += W) {
    for (int64_t v = 0; v < vectors; ++v) {
      const float* source = w.data + c0 * w.stride_c + (first + v * W) * w.stride_k;
      for (int tap = 0; tap < 9; ++tap) {
        load_block(source + tap / 3 * w.stride_r + tap % 3 * w.stride_s, w.stride_k, w.stride_c, blocks[tap]);
      }
      for (int64_t c = 0; c < W; ++c) {
        vd rows[N][3];
        for (int s = 0; s < 3; ++s) {
          vd g[3], o[N];
          for (int r = 0; r < 3; ++r) g[r] = __builtin_convertvector(load(blocks[r * 3 + s] + c * W), vd);
          Transform<M>::weight(g, o);
          for (int i = 0; i < N; ++i) rows[i][s] = o[i];
        }
        float* out = panel + (c0 + c) * columns + v * W;
        for (int i = 0; i < N; ++i) {
          vd o[N];
          Transform<M>::weight(rows[i], o);
          for (int j = 0; j < N; ++j) {
            const vf u = __builtin_convertvector(o[j], vf);
            check += u * 0.0f;  // NaN if u is not finite
            store(out + (i * N + j) * plane, u);
          }
        }
      }
    }
  }
  return all_finite(check);
}

template <int M>
static void winograd_unpack(const WinogradConv& p, int64_t index, float* weight) {
  constexpr int N = M + 2;
  const int64_t first = index * kPanel, columns = panel_vectors(p.out_channels, index) * W;
  const int64_t plane = winograd_plane(p.in_channels, columns);
  const float* panel = p.weight + index * N * N * winograd_plane(p.in_channels, kPanel);
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t k = 0; k < columns; ++k) {
      double rows[3][N];
      for (int j = 0; j < N; ++j) {
        const auto u = [&](int i) -> double { return panel[(i * N + j) * plane + c * columns + k]; };
        rows[0][j] = u(0);
        rows[1][j] = (u(1) - u(2)) * Transform<M>::kMiddle;
        rows[2][j] = u(N - 1);
      }
      for (int r = 0; r < 3; ++r) {
        const double taps[3] = {rows[r][0], (rows[r][1] - rows[r][2]) * Transform<M>::kMiddle, rows[r][N - 1]};
        for (int s = 0; s < 3; ++s) {
          weight[(((first + k) * 3 + r) * 3 + s) * p.in_channels + c] = static_cast<float>(taps[s]);
        }
      }
    }
  }
}

struct TilePlace {
  int64_t image, h, w;  // of the tile's first output
};
FASTRES_INLINE TilePlace tile_place(const WinogradConv& p, int64_t tile) {
  const int64_t plane = p.tile_rows() * p.tile_columns(), place = tile % plane;
  return {tile / plane, place / p.tile_columns() * p.tile, place % p.tile_columns() * p.tile};
}

// The N x N transformed values of W channels of a tile to out, out + plane, ...
template <int M, class T>
FASTRES_INLINE void transform_input_tile(const WinogradConv& p, const TilePlace& place, int64_t channel, float* out,
                                         int64_t plane) {
  constexpr int N = M + 2;
  const int64_t channels = p.in_channels, row = p.width * channels;
  const int64_t top = place.h - p.pad_h, left = place.w - p.pad_w;
  const T* x = static_cast<const T*>(p.x) + ((place.image * p.height + top) * p.width + left) * channels + channel;
  const bool inside = top >= 0 && left >= 0 && top + N <= p.height && left + N <= p.width;
  vf columns[N][N];  // [row][column], rows transformed
#pragma GCC unroll 6
  for (int j = 0; j < N; ++j) {
    vf d[N], o[N];
    const bool inside_w = left + j >= 0 && left + j < p.width;
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      const bool read = inside || (inside_w && top + i >= 0 && top + i < p.height);
      d[i] = read ? load(x + i * row + j * channels) : vf{};
    }
    Transform<M>::input(d, o);
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) columns[i][j] = o[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    vf o[N];
    Transform<M>::input(columns[i], o);
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) store(out + (i * N + j) * plane, o[j]);
  }
}

template <int M>
static void winograd_transform(const WinogradConv& p, int64_t first, int64_t group, int64_t begin, int64_t end,
                               float* v) {
  const int64_t plane = winograd_plane(group, p.in_channels);
  with_storage(p.dtype, [&](auto stored) {
    for (int64_t t = begin; t < end; ++t) {
      const TilePlace place = tile_place(p, first + t);
      for (int64_t c = 0; c < p.in_channels; c += W) {
        transform_input_tile<M, typename decltype(stored)::type>(p, place, c, v + t * p.in_channels + c, plane);
      }
    }
  });
}

// What is left of z when it is stored.
template <class T>
FASTRES_INLINE vf rounded(vf z) {
  T buffer[W];
  store(buffer, z);
  return load(buffer);
}

// The mean of a tile's outputs, of those in the image.
template <int M>
FASTRES_INLINE vf tile_mean(const vf rows[M][M + 2], int64_t height, int64_t width) {
  vf sum{};
  float count = 0;
  for (int i = 0; i < M && i < height; ++i) {
    vf o[M];
    Transform<M>::output(rows[i], o);
    for (int j = 0; j < M && j < width; ++j, ++count) sum += o[j];
  }
  return sum / count;
}

// The inverse transform of one vector of channels of all tiles of a group. Returns zeros where all values are finite.
template <int M, class T, bool kSums>
static vf winograd_output(const WinogradConv& p, int64_t first, int64_t group, int64_t channel, const float* m,
                          int64_t columns, int64_t plane) {
  constexpr int N = M + 2;
  const vf floor = splat(p.epilogue.relu ? 0.0f : -__builtin_inff());
  const vf bias = p.epilogue.bias ? load(p.epilogue.bias + channel) : vf{};
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  T* y = static_cast<T*>(p.y);
  vf check{}, point{}, total1{}, total2{};
  for (int64_t t = 0; t < group; ++t) {
    const TilePlace place = tile_place(p, first + t);
    const float* in = m + t * columns;
    vf rows[M][N];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {
      vf d[N], o[M];
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) d[i] = load(in + (i * N + j) * plane);
      Transform<M>::output(d, o);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) rows[i][j] = o[i];
    }
    const int64_t start = ((place.image * p.out_height + place.h) * p.out_width + place.w) * p.out_channels + channel;
    const int64_t height = p.out_height - place.h, width = p.out_width - place.w;  // what is left of the image
    vf sum1{}, sum2{};                                                             // of a tile
    if (kSums && t == 0) point = finite_or_zero(tile_mean<M>(rows, height, width) + bias);
    for (int i = 0; i < M && i < height; ++i) {
      vf o[M];
      Transform<M>::output(rows[i], o);
      for (int j = 0; j < M && j < width; ++j) {
        const int64_t at = start + (i * p.out_width + j) * p.out_channels;
        check += o[j] * 0.0f;  // NaN if o is not finite
        vf z = o[j] + bias;
        if (residual) z += load(residual + at);
        z = at_least(floor, z);
        store(y + at, z);
        if (kSums) {
          const vf distance = rounded<T>(z) - point;
          sum1 += distance;
          sum2 += distance * distance;
        }
      }
    }
    total1 += sum1;
    total2 += sum2;
  }
  if (kSums) {
    store(p.sums + channel, point);
    store(p.sums + p.out_channels + channel, total1);
    store(p.sums + 2 * p.out_channels + channel, total2);
  }
  return check;
}

template <int M>
static bool winograd_multiply(const WinogradConv& p, int64_t first, int64_t group, int64_t first_panel,
                              int64_t last_panel, int64_t together, const float* v, float* m) {
  constexpr int positions = (M + 2) * (M + 2);
  const int64_t channels = p.in_channels, in_plane = winograd_plane(group, channels);
  const int64_t room = positions * winograd_plane(group, kPanel);
  vf check{};
  for (int64_t begin = first_panel; begin < last_panel; begin += together) {
    const int64_t end = begin + together < last_panel ? begin + together : last_panel;
    for (int64_t position = 0; position < positions; ++position) {
      const float* a = v + position * in_plane;
      for (int64_t panel = begin; panel < end; ++panel) {
        with_vectors(panel_vectors(p.out_channels, panel), [&](auto n) {
          constexpr int NV = decltype(n)::n;
          const float* weight = p.weight + panel * positions * winograd_plane(channels, kPanel) +
                                position * winograd_plane(channels, NV * W);
          float* out = m + (panel - begin) * room + position * winograd_plane(group, NV * W);
          for_each_tile(group, [&](int64_t t, int64_t height) {
            const float* rows[kTileRows];
            for (int r = 0; r < height; ++r) rows[r] = a + (t + r) * channels;
            for (int64_t from = 0; from < channels; from += kSummed) {
              const int64_t to = channels - from < kSummed ? channels : from + kSummed;
              tile_of_rows<NV>(height, rows, 0, 1, from, to, weight + from * NV * W, [&](int r, int i, vf sum) {
                float* place = out + ((t + r) * NV + i) * W;
                store(place, from > 0 ? load(place) + sum : sum);
              });
            }
          });
        });
      }
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t vectors = panel_vectors(p.out_channels, panel), columns = vectors * W;
      const float* in = m + (panel - begin) * room;
      for (int64_t i = 0; i < vectors; ++i) {
        check += with_storage(p.dtype, [&](auto stored) {
          using T = typename decltype(stored)::type;
          return (p.sums ? winograd_output<M, T, true>
                         : winograd_output<M, T, false>)(p, first, group, panel * kPanel + i * W, in + i * W, columns,
                                                         winograd_plane(group, columns));
        });
      }
    }
  }
  return all_finite(check);
}

template <int M>
constexpr WinogradKernels winograd_kernels_of = {
    kPanel, kTileRows, W, winograd_pack<M>, winograd_unpack<M>, winograd_transform<M>, winograd_multiply<M>};
constexpr WinogradKernels winograd2_table = winograd_kernels_of<2>, winograd4_table = winograd_kernels_of<4>;
