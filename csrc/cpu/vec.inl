// Vectors of fp32 values and their storage types (fp32, bf16, fp16), for one instruction set (FASTRES_LEVEL 0 to 3).
// GCC/Clang vector extensions: the same text becomes SSE, AVX2 or AVX-512; intrinsics only where the compilers have no other way.

constexpr int W = FASTRES_LEVEL >= 2 ? 16 : 8;  // fp32 lanes; a multiple of 8, so that mask bits fill whole bytes

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

#define FASTRES_INLINE static inline __attribute__((always_inline))
#define FASTRES_INLINE_MEMBER inline __attribute__((always_inline))

FASTRES_INLINE vf splat(float s) { return s - vf{}; }  // minus: 0 + s would be an addition, because of -0
FASTRES_INLINE vi splat(int32_t s) { return vi{} + s; }
FASTRES_INLINE vf select(vi condition, vf a, vf b) { return (vf)(((vi)a & condition) | ((vi)b & ~condition)); }

// max(z, floor), and NaN where z is NaN: the processors' maximum gives its second operand then.
FASTRES_INLINE vf at_least(vf floor, vf z) {
#if FASTRES_LEVEL >= 2
  return (vf)_mm512_max_ps((__m512)floor, (__m512)z);
#elif FASTRES_LEVEL == 1
  return (vf)_mm256_max_ps((__m256)floor, (__m256)z);
#else
  return select(z < floor, floor, z);
#endif
}

FASTRES_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTRES_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

FASTRES_INLINE vf load(const BF16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
}
FASTRES_INLINE void store(BF16* p, vf v) {
#if FASTRES_LEVEL == 3
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // rounds to nearest even; flushes bf16 subnormals to zero
  __builtin_memcpy(p, &h, sizeof h);
#else
  const vi bits = (vi)v;
  const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const vi nan = (bits >> 16) | 0x40;                             // quiet, payload's upper bits kept
  const vi is_nan = v != v;
  const vh h = __builtin_convertvector((nan & is_nan) | (rounded & ~is_nan), vh);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

#if FASTRES_LEVEL > 0
#define FASTRES_F16 FASTRES_INLINE
#else  // W conversions by integer arithmetic: a function call, because unrolled loops would hold hundreds of them
#define FASTRES_F16 static inline __attribute__((noinline))
#endif
FASTRES_F16 vf load(const F16* p) {
#if FASTRES_LEVEL >= 2
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif FASTRES_LEVEL == 1
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
FASTRES_F16 void store(F16* p, vf v) {
#if FASTRES_LEVEL >= 2
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTRES_LEVEL == 1
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; ++i) p[i] = float_to_half(v[i]);
#endif
}
#undef FASTRES_F16

// The first n < W values; the other lanes are zero, or not written.
template <class T>
FASTRES_INLINE vf load(const T* p, int64_t n) {
  T buffer[W] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
FASTRES_INLINE void store(T* p, vf v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// v[from[i]] in each lane i.
FASTRES_INLINE vf permute(vf v, vi from) {
#if FASTRES_LEVEL >= 2
  return (vf)_mm512_permutexvar_ps((__m512i)from, (__m512)v);
#elif FASTRES_LEVEL == 1
  return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
  vf out;
  for (int i = 0; i < W; ++i) out[i] = v[from[i]];
  return out;
#endif
}
// The same where lanes take from their own W / 2 only, which is faster.
FASTRES_INLINE vf permute_in_halves(vf v, vi from) {
#if FASTRES_LEVEL == 1
  return (vf)_mm256_permutevar_ps((__m256)v, (__m256i)from);
#else
  return permute(v, from);
#endif
}
FASTRES_INLINE vf gather(const float* p, vi from) {
#if FASTRES_LEVEL >= 2
  return (vf)_mm512_i32gather_ps((__m512i)from, p, 4);
#elif FASTRES_LEVEL == 1
  return (vf)_mm256_i32gather_ps(p, (__m256i)from, 4);
#else
  vf out;
  for (int i = 0; i < W; ++i) out[i] = p[from[i]];
  return out;
#endif
}

// n is W (a constant, for the body of a loop) or smaller (its tail).
struct Full {
  static constexpr int64_t n = W;
};
struct Tail {
  int64_t n;
};
template <class T>
FASTRES_INLINE vf load(const T* p, Full) {
  return load(p);
}
template <class T>
FASTRES_INLINE vf load(const T* p, Tail t) {
  return load(p, t.n);
}
template <class T>
FASTRES_INLINE void store(T* p, vf v, Full) {
  store(p, v);
}
template <class T>
FASTRES_INLINE void store(T* p, vf v, Tail t) {
  store(p, v, t.n);
}

// One bit a lane, lane 0 in bit 0. `lanes` holds 0 or -1 in each lane.
FASTRES_INLINE uint32_t to_bits(vi lanes) {
#if FASTRES_LEVEL >= 2
  return _mm512_movepi32_mask((__m512i)lanes);
#elif FASTRES_LEVEL == 1
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(lanes[i] & 1) << i;
  return bits;
#endif
}
FASTRES_INLINE vi lane_numbers() {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}
FASTRES_INLINE vi first_lanes(int64_t n) { return lane_numbers() < splat(static_cast<int32_t>(n)); }
FASTRES_INLINE vi from_bits(uint32_t bits) {
  const vi lane_bit = splat(1) << lane_numbers();
  return (splat(static_cast<int32_t>(bits)) & lane_bit) != 0;
}
// Mask bytes of the values at i .. i + n of a run; runs start at a byte of their own.
template <class N>
FASTRES_INLINE void store_bits(uint8_t* mask, int64_t i, vi lanes, N n) {
  const uint32_t bits = to_bits(lanes) & ((uint64_t{1} << n.n) - 1);
  __builtin_memcpy(mask + i / 8, &bits, (n.n + 7) / 8);
}
template <class N>
FASTRES_INLINE vi load_bits(const uint8_t* mask, int64_t i, N n) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, mask + i / 8, (n.n + 7) / 8);
  return from_bits(bits);
}

// f(i, Full) or f(i, Tail) for each vector of a run of `length` values.
template <class F>
FASTRES_INLINE void for_each_vector(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + W <= length; i += W) f(i, Full{});
  if (i < length) f(i, Tail{length - i});
}
