// Kernels of add_act.h for one instruction set.

template <class T>
void add_forward(const void* a, const void* b, void* y, bool relu, int64_t begin, int64_t end) {
  const vf floor = splat(relu ? 0.0f : -__builtin_inff());
  for_each_vector(end - begin, [&](int64_t i, auto n) {
    const vf z = load(static_cast<const T*>(a) + begin + i, n) + load(static_cast<const T*>(b) + begin + i, n);
    store(static_cast<T*>(y) + begin + i, at_least(floor, z), n);  // NaN < 0 is false: NaN stays
  });
}

template <class T>
void add_backward(const void* grad_y, const void* y, void* grad, int64_t begin, int64_t end) {
  for_each_vector(end - begin, [&](int64_t i, auto n) {
    const vf active = load(static_cast<const T*>(y) + begin + i, n);
    const vf g = load(static_cast<const T*>(grad_y) + begin + i, n);
    store(static_cast<T*>(grad) + begin + i, select(~(active <= 0.0f), g, vf{}), n);
  });
}

constexpr AddActKernels add_act_table[3] = {{add_forward<float>, add_backward<float>},
                                            {add_forward<BF16>, add_backward<BF16>},
                                            {add_forward<F16>, add_backward<F16>}};
