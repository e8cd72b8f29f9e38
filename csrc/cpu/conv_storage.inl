// Activations of the convolutions in their storage types, for one instruction set.

template <class T>
struct Stored {
  using type = T;
};
// f(Stored<T>) for the type of a dtype.
template <class F>
FASTRES_INLINE auto with_storage(int dtype, const F& f) {
  if (dtype == 1) return f(Stored<BF16>{});
  if (dtype == 2) return f(Stored<F16>{});
  return f(Stored<float>{});
}

template <class T>
static void to_float(const void* values, int64_t count, float* out) {
  for_each_vector(count, [&](int64_t i, auto n) { store(out + i, load(static_cast<const T*>(values) + i, n), n); });
}

constexpr ToFloat to_float_table[3] = {to_float<float>, to_float<BF16>, to_float<F16>};
