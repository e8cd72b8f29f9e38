// Convolutions in groups, and their weight gradient, over all threads: blocks of pixels by ranges of panels (conv_grouped.h).
#include "conv_grouped.h"

#include <algorithm>

#include "conv_methods.h"

namespace fastres {
namespace {

// Cuts the grid into blocks of rows and has what the kernels need to know of one of them at a time.
class Blocks {
 public:
  Blocks(const GroupShape& shape, const GemmConv& conv) : conv_(conv) {
    if (conv.taps > 0) {
      const auto [low_h, high_h] = std::minmax_element(conv.tap_h, conv.tap_h + conv.taps);
      const auto [low_w, high_w] = std::minmax_element(conv.tap_w, conv.tap_w + conv.taps);
      top_ = *low_h, reach_ = *high_h - *low_h + 1, left_ = *low_w;
      columns_ = (conv.grid_width - 1) * conv.step_w + *high_w - *low_w + 1;
    }
    for (int64_t t = 0; t < conv.taps; ++t) {
      taps_.push_back((conv.tap_h[t] - top_) * columns_ + conv.tap_w[t] - left_);
    }
    const int64_t row = std::max<int64_t>(1, columns_ * grouped_kernels().copy_floats(shape));
    const int64_t fitting = (kCopyFloats / row - reach_) / conv.step_h + 1;
    const int64_t least = 2 * reach_ / conv.step_h + 1;  // two blocks read the rows between them
    height_ = std::min(std::max(fitting, least), conv.grid_height);
  }
  int64_t count() const { return divide_up(conv_.grid_height, height_); }                // in an image, at least
  int64_t pixels() const { return ((height_ - 1) * conv_.step_h + reach_) * columns_; }  // of x, at most
  int64_t outputs() const { return height_ * conv_.grid_width; }

  // The index-th of `count` blocks of an image; perhaps an empty one.
  GroupedBlock block(int64_t image, int64_t index, int64_t count) {
    const int64_t begin = index * conv_.grid_height / count, end = (index + 1) * conv_.grid_height / count;
    first_.resize((end - begin) * conv_.grid_width);
    places_.resize(first_.size());
    int64_t i = 0;
    for (int64_t h = begin; h < end; ++h) {
      const int64_t y_row = (image * conv_.y_height + h * conv_.y_step_h + conv_.y_first_h) * conv_.y_width;
      for (int64_t w = 0; w < conv_.grid_width; ++w, ++i) {
        first_[i] = (h - begin) * conv_.step_h * columns_ + w * conv_.step_w;
        places_[i] = (y_row + w * conv_.y_step_w + conv_.y_first_w) * conv_.y_pixel;
      }
    }
    return {static_cast<const float*>(conv_.x) + image * conv_.height * conv_.width * conv_.x_pixel,
            begin * conv_.step_h + top_,
            left_,
            (end - 1 - begin) * conv_.step_h + reach_,
            columns_,
            i,
            first_.data(),
            taps_.data(),
            places_.data()};
  }

 private:
  static constexpr int64_t kCopyFloats = 1 << 14;  // of x, for a panel: 64 KB
  const GemmConv& conv_;
  int64_t top_ = 0, left_ = 0, reach_ = 0;  // of what an output pixel reads: the first row and column, the rows
  int64_t columns_ = 0;                     // that a row of output pixels reads
  int64_t height_;                          // rows of a block, at most
  std::vector<int64_t> first_, taps_, places_;
};

}  // namespace

GroupShape group_shape(const Geometry& g) { return {g.in_channels, g.out_channels, g.group_in(), g.group_out()}; }

int64_t grouped_floats(const GroupShape& shape, const Taps& taps) {
  return grouped_kernels().floats(shape) * taps.count() * shape.group_in;
}

bool pack_grouped(const GroupShape& shape, const WeightView& view, int64_t group_stride, const Taps& taps,
                  float* packed) {
  const GroupedKernels& kernels = grouped_kernels();
  std::vector<char> finite(kernels.panels(shape));
  torch::stable::parallel_for(0, static_cast<int64_t>(finite.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      finite[i] = kernels.pack(shape, view, group_stride, taps.count(), taps.r.data(), taps.s.data(), i, packed);
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

void run_grouped(const GroupShape& shape, const std::vector<GemmConv>& convs) {
  const GroupedKernels& kernels = grouped_kernels();
  const int64_t images = convs[0].images, panels = kernels.panels(shape), tasks = 4 * torch::stable::get_num_threads();
  int64_t blocks = 1;
  for (const GemmConv& conv : convs) blocks = std::max(blocks, Blocks(shape, conv).count());
  const int64_t parts = std::clamp<int64_t>(divide_up(tasks, images * blocks), 1, panels);
  share_tasks(images * blocks * parts, [&](const auto& take) {
    std::vector<Blocks> cut;
    int64_t pixels = 0;
    for (const GemmConv& conv : convs) pixels = std::max(pixels, cut.emplace_back(shape, conv).pixels());
    const Scratch scratch(kernels.copy_floats(shape) * pixels + 16);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t part = task % parts, index = task / parts % blocks, image = task / parts / blocks;
      for (size_t i = 0; i < convs.size(); ++i) {
        const GroupedBlock block = cut[i].block(image, index, blocks);
        if (block.count == 0) continue;
        kernels.run(shape, convs[i], block, part * panels / parts, (part + 1) * panels / parts, scratch.data());
      }
    }
  });
}

void conv_grouped(const Geometry& g, const float* x, const float* packed, const Epilogue& epilogue, float* y) {
  const ForwardGemm whole(g, {x, 0}, packed, epilogue, y);
  run_grouped(group_shape(g), {whole.conv});
}

// The blocks are cut into parts whose sums are added in order; how many depends on the shape alone, so results are repeatable.
void grouped_weight_gradient(const Geometry& g, const float* grad, const float* x, float* out) {
  const GroupedKernels& kernels = grouped_kernels();
  const GroupShape shape = group_shape(g);
  const ForwardGemm whole(g, {x, 0}, nullptr, {}, nullptr);
  const GemmConv& conv = whole.conv;
  const int64_t panels = kernels.panels(shape), floats = grouped_floats(shape, whole.taps);
  const int64_t per_image = Blocks(shape, conv).count(), blocks = g.images * per_image;
  const int64_t parts = std::clamp<int64_t>((1 << 21) / floats, 1, std::min<int64_t>(blocks, 16));
  const int64_t ranges = std::min(panels, divide_up(2 * torch::stable::get_num_threads(), parts));  // of panels
  const Scratch sums(parts * floats);
  torch::stable::parallel_for(0, parts * floats, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(sums.data() + begin, sums.data() + end, 0.0f);
  });
  share_tasks(parts * ranges, [&](const auto& take) {
    Blocks cut(shape, conv);
    const Scratch scratch(kernels.copy_floats(shape) * cut.pixels() + 16 + kernels.panel * cut.outputs());
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t part = task / ranges, range = task % ranges;
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        kernels.weight_gradient(shape, conv, grad, cut.block(i / per_image, i % per_image, per_image),
                                range * panels / ranges, (range + 1) * panels / ranges, scratch.data(),
                                sums.data() + part * floats);
      }
    }
  });
  torch::stable::parallel_for(0, floats, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = sums.data() + part * floats;
      for (int64_t i = begin; i < end; ++i) sums.data()[i] += from[i];
    }
  });
  torch::stable::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.unpack(shape, conv.taps, i, sums.data(), out);
  });
}

}  // namespace fastres
