// The stem of conv.h (StemConv) over the rows of an image, and over all threads.
#include <algorithm>

#include "conv_methods.h"

namespace fastres {
namespace {

StemConv stem_of(const Geometry& g) {
  return {g.kernel_h, g.in_channels, g.out_channels, g.out_width, divide_up(g.out_width, 4), nullptr, nullptr, false};
}

}  // namespace

bool stem_fits(const Geometry& g) {
  return g.rows_as_taps() && g.kernel_w == 7 && g.stride_w == 2 && g.dilation_h == 1 && g.out_width >= 4;
}

int64_t stem_floats(const Geometry& g) { return stem_weights(stem_of(g)) * padded_channels(g.out_channels); }

bool pack_stem(const Geometry& g, const WeightView& view, float* packed) {
  const StemConv conv = stem_of(g);
  const StemKernels& kernels = stem_kernels();
  bool finite = true;
  for (int64_t i = 0; i * kernels.panel < g.out_channels; ++i) finite &= kernels.pack(conv, view, i, packed);
  return finite;
}

StemRows::StemRows(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue)
    : g_(g),
      x_(x),
      kernels_(stem_kernels()),
      conv_(stem_of(g)),
      to_float_(to_float_kernel(x.dtype)),
      line_(stem_line(conv_.tiles, kernels_.lanes) * g.in_channels),
      pixels_(std::max(8 * (conv_.tiles + 1), g.width + 2 * g.pad_w)),
      row_(pixels_ * g.in_channels),
      planes_(8 * line_),
      ring_(g.kernel_h * kStemValues * line_),
      sums_(7 * conv_.tiles * kernels_.panel),
      held_(g.kernel_h, -1),
      rows_(g.kernel_h) {
  conv_.weight = packed;
  conv_.bias = epilogue.bias;
  conv_.relu = epilogue.relu;
  std::fill(row_.data(), row_.data() + pixels_ * g.in_channels, 0.0f);
}

const float* StemRows::transformed(int64_t image, int64_t padded_row) {
  const int64_t slot = padded_row % g_.kernel_h, id = image * g_.padded_height() + padded_row;
  float* out = ring_.data() + slot * kStemValues * line_;
  if (held_[slot] == id) return out;
  held_[slot] = id;
  const int64_t h = padded_row - g_.pad_h;
  if (h < 0 || h >= g_.height) {
    std::fill(out, out + kStemValues * line_, 0.0f);
  } else {
    const int64_t row = g_.width * g_.in_channels;
    to_float_(element(x_.data, x_.dtype, (image * g_.height + h) * row), row, row_.data() + g_.pad_w * g_.in_channels);
    kernels_.transform(conv_, row_.data(), planes_.data(), out);
  }
  return out;
}

void StemRows::rows_of(int64_t image, int64_t h) {
  for (int64_t r = 0; r < g_.kernel_h; ++r) rows_[r] = transformed(image, h * g_.stride_h + r);
}

bool StemRows::run(int64_t image, int64_t first, int64_t last, float* y) {
  bool finite = true;
  for (int64_t h = first; h < last; ++h, y += g_.out_width * g_.out_channels) {
    rows_of(image, h);
    finite &= kernels_.row(conv_, rows_.data(), sums_.data(), y);
  }
  return finite;
}

void StemRows::add_gradient(int64_t image, int64_t first, int64_t last, const Activation& grad, float* sums) {
  const int64_t row = g_.out_width * g_.out_channels;
  std::vector<float> copy(grad.dtype != 0 ? row : 0);
  for (int64_t h = first; h < last; ++h) {
    rows_of(image, h);
    const void* from = element(grad.data, grad.dtype, (image * g_.out_height + h) * row);
    if (grad.dtype != 0) to_float_kernel(grad.dtype)(from, row, copy.data());
    kernels_.gradient(conv_, rows_.data(), grad.dtype != 0 ? copy.data() : static_cast<const float*>(from),
                      sums_.data(), sums);
  }
}

bool conv_stem(const Geometry& g, const Activation& x, const float* packed, const Epilogue& epilogue, float* y) {
  constexpr int64_t kRows = 16;  // of a task: the first one transforms kernel_h rows, the others stride_h each
  const int64_t parts = divide_up(g.out_height, kRows), row = g.out_width * g.out_channels;
  std::atomic<bool> finite{true};
  share_tasks(g.images * parts, [&](const auto& take) {
    StemRows rows(g, x, packed, epilogue);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t image = task / parts, part = task % parts;
      const int64_t first = part * g.out_height / parts, last = (part + 1) * g.out_height / parts;
      if (!rows.run(image, first, last, y + (image * g.out_height + first) * row)) finite = false;
    }
  });
  return finite;
}

bool stem_weight_gradient(const Geometry& g, const Activation& grad, const Activation& x, float* out) {
  constexpr int64_t kParts = 32;  // sums that are added in order: how many depends on the shape alone
  const StemKernels& kernels = stem_kernels();
  const StemConv conv = stem_of(g);
  const int64_t rows = g.images * g.out_height, parts = std::min(rows, kParts), floats = stem_floats(g);
  const Scratch sums(parts * floats);
  std::vector<const float*> sums_of(parts);
  for (int64_t i = 0; i < parts; ++i) sums_of[i] = sums.data() + i * floats;
  share_tasks(parts, [&](const auto& take) {
    StemRows stem(g, x, nullptr, {});
    for (int64_t part = take(); part >= 0; part = take()) {
      float* own = sums.data() + part * floats;
      std::fill(own, own + floats, 0.0f);
      for (int64_t row = part * rows / parts, end = (part + 1) * rows / parts; row < end;) {
        const int64_t image = row / g.out_height, first = row % g.out_height;
        const int64_t last = std::min(g.out_height, first + end - row);
        stem.add_gradient(image, first, last, grad, own);
        row += last - first;
      }
    }
  });
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, divide_up(g.out_channels, kernels.panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!kernels.finish(conv, i, sums_of.data(), parts, out)) finite = false;
    }
  });
  return finite;
}

}  // namespace fastres
