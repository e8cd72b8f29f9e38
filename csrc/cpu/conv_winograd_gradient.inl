// The weight gradient of F(4x4, 3x3): the adjoint of conv_winograd.inl. With V = B^T d B of the input tile as in forward,
//   gradient A g A^T:  A g = [g0, E1 + O1, E1 - O1, E2 + O2, E2 - O2, g3]
//                      E1 = g0 + g2 / 2, O1 = a g1 + a^3 g3, E2 = g0 + 2 g2, O2 = b g1 + b^3 g3
//   weight   G^T u G:  G^T u = [u0 - s1 / 1.5 + s2 / 6, b d2 / 6 - a d1 / 1.5, u5 - s1 / 3 + s2 / 3]
//                      s1 = u1 + u2, d1 = u1 - u2, s2 = u3 + u4, d2 = u3 - u4
// where u = sum over tiles of (A g A^T) * V, a matrix product for each of the 36 places.

FASTRES_INLINE void gradient_transform(const vf g[4], vf o[6]) {
  const vf e1 = g[0] + 0.5f * g[2], o1 = static_cast<float>(kA) * g[1] + static_cast<float>(kA * kA * kA) * g[3];
  const vf e2 = g[0] + 2.0f * g[2], o2 = static_cast<float>(kB) * g[1] + static_cast<float>(kB * kB * kB) * g[3];
  o[0] = g[0];
  o[1] = e1 + o1;
  o[2] = e1 - o1;
  o[3] = e2 + o2;
  o[4] = e2 - o2;
  o[5] = g[3];
}

FASTRES_INLINE void weight_adjoint(const vf u[6], vf w[3]) {
  const vf s1 = u[1] + u[2], d1 = u[1] - u[2], s2 = u[3] + u[4], d2 = u[3] - u[4];
  w[0] = u[0] - static_cast<float>(1 / 1.5) * s1 + static_cast<float>(1 / 6.0) * s2;
  w[1] = static_cast<float>(kB / 6) * d2 - static_cast<float>(kA / 1.5) * d1;
  w[2] = u[5] + static_cast<float>(1 / 3.0) * (s2 - s1);
}

// v: [panel][36][tile][columns of the panel].
static void winograd_gradient_input(const WinogradConv& p, int64_t first, int64_t group, int64_t begin, int64_t end,
                                    float* v) {
  with_storage(p.dtype, [&](auto stored) {
    for (int64_t t = begin; t < end; ++t) {
      const TilePlace place = tile_place(p, first + t);
      for (int64_t c = 0; c < p.in_channels; c += W) {
        const int64_t panel = c / kPanel, columns = panel_vectors(p.in_channels, panel) * W;
        float* out = v + panel * 36 * winograd_plane(group, kPanel) + t * columns + c % kPanel;
        transform_input_tile<4, typename decltype(stored)::type>(p, place, c, out, winograd_plane(group, columns));
      }
    }
  });
}

// g: [36][tile][out_channels and 16 more, so that the rows of a tile do not share cache sets].
template <class T>
static void winograd_gradient_output_of(const WinogradConv& p, const T* grad, int64_t first, int64_t group,
                                        int64_t begin, int64_t end, float* g) {
  const int64_t channels = p.out_channels, stride = channels + 16, plane = winograd_plane(group, stride);
  for (int64_t t = begin; t < end; ++t) {
    const TilePlace place = tile_place(p, first + t);
    const T* from = grad + ((place.image * p.out_height + place.h) * p.out_width + place.w) * channels;
    for (int64_t c = 0; c < channels; c += W) {
      vf columns[6][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        vf d[4], o[6];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const bool inside = place.h + i < p.out_height && place.w + j < p.out_width;
          d[i] = inside ? load(from + (i * p.out_width + j) * channels + c) : vf{};
        }
        gradient_transform(d, o);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) columns[i][j] = o[i];
      }
      float* out = g + t * stride + c;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        vf o[6];
        gradient_transform(columns[i], o);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(out + (i * 6 + j) * plane, o[j]);
      }
    }
  }
}

static void winograd_gradient_output(const WinogradConv& p, const void* grad, int64_t first, int64_t group,
                                     int64_t begin, int64_t end, float* g) {
  with_storage(p.dtype, [&](auto stored) {
    using T = typename decltype(stored)::type;
    winograd_gradient_output_of(p, static_cast<const T*>(grad), first, group, begin, end, g);
  });
}

// Tiles [begin, end) of the group, one panel of input channels, rows [first_row, last_row) of kTileRows output channels.
// sums: [row][36][kTileRows][columns of the panel] of this panel.
static void winograd_gradient_multiply(const WinogradConv& p, int64_t group, int64_t begin, int64_t end, int64_t panel,
                                       int64_t first_row, int64_t last_row, const float* v, const float* g, bool add,
                                       float* sums) {
  const int64_t stride = p.out_channels + 16, g_plane = winograd_plane(group, stride);
  with_vectors(panel_vectors(p.in_channels, panel), [&](auto n) {
    constexpr int NV = decltype(n)::n;
    const int64_t v_plane = winograd_plane(group, NV * W);
    v += panel * 36 * winograd_plane(group, kPanel) + begin * NV * W;
    for (int64_t row = first_row; row < last_row; ++row) {
      const float* a = g + begin * stride + row * kTileRows;
      float* out = sums + row * 36 * kTileRows * NV * W;
      for (int64_t position = 0; position < 36; ++position) {
        outer_tile<NV>(a + position * g_plane, stride, v + position * v_plane, end - begin, [&](int r, int i, vf sum) {
          float* place = out + ((position * kTileRows + r) * NV + i) * W;
          store(place, add ? load(place) + sum : sum);
        });
      }
    }
  });
}

// Weight gradient [out_channels][3][3][in_channels] from the sums of a panel. Returns whether it is finite.
static bool winograd_gradient_finish(const WinogradConv& p, int64_t panel, int64_t first_row, int64_t last_row,
                                     const float* sums, float* weight) {
  const int64_t columns = panel_vectors(p.in_channels, panel) * W, plane = kTileRows * columns;
  vf check{};
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t k = row * kTileRows; k < (row + 1) * kTileRows && k < p.out_channels; ++k) {
      for (int64_t c = 0; c < columns; c += W) {
        const float* u = sums + row * 36 * plane + k % kTileRows * columns + c;
        vf rows[3][6];
        for (int j = 0; j < 6; ++j) {
          vf d[6], w[3];
          for (int i = 0; i < 6; ++i) d[i] = load(u + (i * 6 + j) * plane);
          weight_adjoint(d, w);
          for (int r = 0; r < 3; ++r) rows[r][j] = w[r];
        }
        float* out = weight + k * 9 * p.in_channels + panel * kPanel + c;
        for (int r = 0; r < 3; ++r) {
          vf w[3];
          weight_adjoint(rows[r], w);
          for (int s = 0; s < 3; ++s) {
            check += w[s] * 0.0f;
            store(out + (r * 3 + s) * p.in_channels, w[s]);
          }
        }
      }
    }
  }
  return all_finite(check);
}

constexpr WinogradGradientKernels winograd_gradient_table = {kPanel,
                                                             kTileRows,
                                                             winograd_gradient_input,
                                                             winograd_gradient_output,
                                                             winograd_gradient_multiply,
                                                             winograd_gradient_finish};
