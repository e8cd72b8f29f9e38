// fastres_cpu::program_*: inference of a whole network in one call, for networks whose layers take microseconds: each with its own
// call, allocations and parallel region would spend more time on those than on arithmetic.
//
// A program is a list of steps, made once by fastres/kernels/program.py. All threads go through the list in one parallel region. A
// step is cut into tasks, and a thread that finds none left waits until the others have finished theirs. It waits for
// running threads only, so any number of threads that really runs, one too, gets through.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "classify.h"
#include "conv_methods.h"
#include "witness.h"

namespace fastres {
namespace {

// What a thread has while it runs a step.
struct Work {
  const float *x, *residual;
  float *y, *scratch;  // scratch: of this thread, the same in all tasks of a step
  bool first;          // task of this thread in this step
};

class Step {
 public:
  virtual ~Step() = default;
  int64_t x = 0, residual = -1;  // the values it reads; -1: none
  int64_t tasks = 1, scratch = 0;
  // Returns whether the outputs are finite, where that has to be known.
  virtual bool run(int64_t task, const Work& work) const = 0;
};

struct Range {
  int64_t begin, end;
  Range(int64_t task, int64_t tasks, int64_t count) : begin(task * count / tasks), end((task + 1) * count / tasks) {}
};

// Puts zeros around the images (the input of GemmStep where rows are taps).
class PadStep : public Step {
 public:
  PadStep(const Geometry& g, int64_t threads) : g_(g) { tasks = std::min(threads, g.padded_rows()); }
  bool run(int64_t task, const Work& work) const override {
    const Range rows(task, tasks, g_.padded_rows());
    pad_rows(g_, {work.x, 0}, work.y, rows.begin, rows.end);
    return true;
  }

 private:
  Geometry g_;
};

class GemmStep : public Step {
 public:
  GemmStep(const Geometry& g, const Tensor& packed, const OptionalTensor& bias, bool relu, int64_t threads)
      : packed_(packed),
        no_x_(g.rows_as_taps() ? g.images * g.height * g.width * g.in_channels : 0),
        whole_(g, {no_x_.data(), 0}, static_cast<const float*>(packed.const_data_ptr()), {}, nullptr) {
    if (bias.has_value()) bias_ = padded_bias(floats(bias, g.out_channels, "bias"), g.out_channels);
    whole_.conv.epilogue = {bias.has_value() ? bias_.data() : nullptr, nullptr, relu};
    no_x_ = {};
    const int64_t rows = gemm_conv_kernels().tile_rows;
    pixels_ = g.pixels();
    panels_ = divide_up(g.out_channels, gemm_conv_kernels().panel);
    tasks = std::max<int64_t>(1, std::min(divide_up(divide_up(pixels_, 16 * rows), threads) * threads, pixels_ / rows));
    table_ = 2 * (whole_.conv.taps + 2) * divide_up(pixels_, tasks);  // pointers are two floats
    scratch = table_ + gemm_scratch_floats(whole_.conv, divide_up(pixels_, tasks), gemm_conv_kernels().panel);
  }
  bool run(int64_t task, const Work& work) const override {
    GemmConv conv = whole_.conv;
    conv.x = work.x;
    conv.y = work.y;
    conv.epilogue.residual = work.residual;
    const Range pixels(task, tasks, pixels_);
    gemm_conv_kernels().run(conv, pixels.begin, pixels.end, 0, panels_, reinterpret_cast<const void**>(work.scratch),
                            work.scratch + table_);
    return true;
  }

 private:
  Tensor packed_;
  std::vector<float> bias_, no_x_;
  ForwardGemm whole_;
  int64_t pixels_, panels_, table_;
};

class WinogradStep : public Step {
 public:
  WinogradStep(const Geometry& g, int64_t tile, const Tensor& packed, const OptionalTensor& bias, bool relu,
               int64_t threads)
      : packed_(packed), kernels_(winograd_kernels(tile)) {
    if (bias.has_value()) bias_ = padded_bias(floats(bias, g.out_channels, "bias"), g.out_channels);
    conv_ = winograd_of(g, tile, {nullptr, 0}, static_cast<const float*>(packed.const_data_ptr()),
                        {bias.has_value() ? bias_.data() : nullptr, nullptr, relu}, nullptr);
    const int64_t tiles = conv_.tiles();
    panels_ = divide_up(g.out_channels, kernels_.panel);
    // Few tiles: every thread transforms all of them for itself, and the panels of the weights are the tasks.
    by_panels_ = tiles < threads * kernels_.tile_rows && panels_ > 1;
    constexpr int64_t kCachedGroup = 1 << 16;  // floats of transformed values
    const int64_t most =
        std::clamp<int64_t>(kCachedGroup / (conv_.positions() * g.in_channels), 4 * kernels_.tile_rows, 48);
    tasks = by_panels_ ? panels_ : std::min(tiles, divide_up(divide_up(tiles, most), threads) * threads);
    const int64_t group = by_panels_ ? tiles : divide_up(tiles, tasks);
    v_floats_ = conv_.positions() * winograd_plane(group, g.in_channels);
    scratch = v_floats_ + conv_.positions() * winograd_plane(group, kernels_.panel);
  }
  bool run(int64_t task, const Work& work) const override {
    WinogradConv conv = conv_;
    conv.x = work.x;
    conv.y = work.y;
    conv.epilogue.residual = work.residual;
    const Range tiles(by_panels_ ? 0 : task, by_panels_ ? 1 : tasks, conv.tiles());
    const int64_t count = tiles.end - tiles.begin, panel = by_panels_ ? task : 0;
    float *v = work.scratch, *m = v + v_floats_;
    if (!by_panels_ || work.first) kernels_.transform(conv, tiles.begin, count, 0, count, v);
    return kernels_.multiply(conv, tiles.begin, count, panel, by_panels_ ? panel + 1 : panels_, 1, v, m);
  }

 private:
  Tensor packed_;
  const WinogradKernels& kernels_;
  std::vector<float> bias_;
  WinogradConv conv_{};
  int64_t panels_, v_floats_;
  bool by_panels_;
};

// Every stride-th pixel, with zeros for the channels that x lacks.
class ZeroPadStep : public Step {
 public:
  ZeroPadStep(const std::vector<int64_t>& x, int64_t channels, int64_t stride, int64_t threads)
      : shape_(x), channels_(channels), stride_(stride) {
    tasks = std::min(threads, rows());
  }
  int64_t height() const { return divide_up(shape_[2], stride_); }
  int64_t width() const { return divide_up(shape_[3], stride_); }
  bool run(int64_t task, const Work& work) const override {
    const int64_t c = shape_[1];
    const Range part(task, tasks, rows());
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t image = row / height(), h = row % height() * stride_;
      const float* from = work.x + (image * shape_[2] + h) * shape_[3] * c;
      float* to = work.y + row * width() * channels_;
      for (int64_t w = 0; w < width(); ++w, from += stride_ * c, to += channels_) {
        std::memcpy(to, from, c * sizeof(float));
        std::fill(to + c, to + channels_, 0.0f);
      }
    }
    return true;
  }

 private:
  int64_t rows() const { return shape_[0] * height(); }
  std::vector<int64_t> shape_;
  int64_t channels_, stride_;
};

class ClassifyStep : public Step {
 public:
  ClassifyStep(const std::vector<int64_t>& x, const Tensor& weight, const OptionalTensor& bias, int64_t threads)
      : images_(x[0]), c_{x[2] * x[3], x[1], weight.size(0), nullptr, nullptr} {
    const float* data = static_cast<const float*>(weight.const_data_ptr());
    weight_.assign(data, data + weight.numel());  // its memory may be gone by the time that this is noticed
    c_.weight = weight_.data();
    if (bias.has_value()) {
      bias_ = padded_bias(floats(bias, c_.classes, "bias"), c_.classes);
      c_.bias = bias_.data();
    }
    tasks = std::min(threads, images_);
  }
  bool run(int64_t task, const Work& work) const override {
    const Range images(task, tasks, images_);
    classify(c_, work.x, images.begin, images.end, work.y);
    return true;
  }

 private:
  std::vector<float> weight_, bias_;
  int64_t images_;
  Classifier c_;
};

// Compares what the weights were made from, while the others do the first step.
class WitnessStep : public Step {
 public:
  WitnessStep(std::vector<Witness> sources, int64_t threads) : sources_(std::move(sources)) {
    tasks = 4 * threads;
    int64_t all = 0, sum = 0;
    for (const Witness& source : sources_) all += source.cost();
    first_.push_back(0);
    for (int64_t i = 0; i < static_cast<int64_t>(sources_.size()); ++i) {
      sum += sources_[i].cost();
      while (sum * tasks >= static_cast<int64_t>(first_.size()) * all) first_.push_back(i + 1);
    }
    first_.resize(tasks + 1, static_cast<int64_t>(sources_.size()));
  }
  bool run(int64_t task, const Work&) const override {
    for (int64_t i = first_[task]; i < first_[task + 1]; ++i) {
      if (!sources_[i].holds()) return false;
    }
    return true;
  }

 private:
  std::vector<Witness> sources_;
  std::vector<int64_t> first_;  // source of each task
};

// The tasks of a step that are taken, and how many are done.
struct alignas(64) Progress {
  std::atomic<int64_t> done{0};
  std::unique_ptr<std::atomic<bool>[]> taken;
};

class Program {
 public:
  explicit Program(std::vector<int64_t> x) : threads_(torch::stable::get_num_threads()) {
    STD_TORCH_CHECK(x.size() == 4, "expected a 4D input");
    shapes_.push_back(std::move(x));
  }

  bool add_conv(int64_t x, int64_t residual, const Tensor& packed, const std::vector<int64_t>& weight,
                const OptionalTensor& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool relu, int64_t method) {
    const Geometry g(shape(x), weight, stride, padding, dilation, 1);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_contiguous(), "packed weight must be fp32");
    const std::vector<int64_t> out{g.images, g.out_channels, g.out_height, g.out_width};
    STD_TORCH_CHECK(residual < 0 || shape(residual) == out, "residual must have the shape of the output");
    const int64_t tile = winograd_tile(method);
    constexpr int64_t kLarge =
        1 << 20;  // floats of a layer's weights: then it takes long enough to be called by itself
    if (packed.numel() > kLarge || g.pixels() == 0 || method == kStem) return false;
    if (tile > 0) {
      STD_TORCH_CHECK(winograd_fits(g) && packed.numel() == winograd_floats(g, tile), "packed weight does not fit");
      add(std::make_unique<WinogradStep>(g, tile, packed, bias, relu, threads_), x, residual, out);
      return true;
    }
    STD_TORCH_CHECK(method == kGemm && packed.numel() == gemm_floats(forward_taps(g), g.in_channels, g.out_channels),
                    "packed weight does not fit");
    if (g.rows_as_taps()) {  // an unnumbered value
      add(std::make_unique<PadStep>(g, threads_), x, -1,
          {g.images, g.in_channels, g.height + 2 * g.pad_h, g.width + 2 * g.pad_w});
      numbers_.pop_back();
      add_at(std::make_unique<GemmStep>(g, packed, bias, relu, threads_), static_cast<int64_t>(shapes_.size()) - 1,
             residual < 0 ? -1 : numbers_[residual], out);
      return true;
    }
    add(std::make_unique<GemmStep>(g, packed, bias, relu, threads_), x, residual, out);
    return true;
  }

  void add_zero_pad(int64_t x, int64_t channels, int64_t stride) {
    const std::vector<int64_t>& from = shape(x);
    STD_TORCH_CHECK(channels >= from[1] && stride > 0, "unsupported shortcut");
    auto step = std::make_unique<ZeroPadStep>(from, channels, stride, threads_);
    const std::vector<int64_t> out{from[0], channels, step->height(), step->width()};
    add(std::move(step), x, -1, out);
  }

  void add_classify(int64_t x, const Tensor& weight, const OptionalTensor& bias) {
    const std::vector<int64_t>& from = shape(x);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                        weight.size(1) == from[1],
                    "weight must be a contiguous float32 matrix [classes, channels]");
    add(std::make_unique<ClassifyStep>(from, weight, bias, threads_), x, -1, {from[0], weight.size(0)});
  }

  // Ends the list. Returns the indices of the sources of which only samples are compared.
  std::vector<int64_t> finish(const std::vector<Tensor>& sources) {
    STD_TORCH_CHECK(!steps_.empty() && !witness_, "a program needs steps, and ends once");
    std::vector<Witness> witnesses(sources.begin(), sources.end());
    std::vector<int64_t> sampled;
    for (int64_t i = 0; i < static_cast<int64_t>(witnesses.size()); ++i) {
      if (!witnesses[i].whole()) sampled.push_back(i);
    }
    witness_ = std::make_unique<WitnessStep>(std::move(witnesses), threads_);
    // A value's memory is given to others after the last step that reads it.
    const int64_t values = static_cast<int64_t>(shapes_.size());
    std::vector<int64_t> last(values, 0), slot_of(values, -1), slot_floats, free;
    for (int64_t i = 0; i < static_cast<int64_t>(steps_.size()); ++i) {
      for (const int64_t value : {steps_[i]->x, steps_[i]->residual}) {
        if (value >= 0) last[value] = i;
      }
    }
    for (int64_t i = 0; i < static_cast<int64_t>(steps_.size()); ++i) {
      const int64_t size = i + 2 == values ? 0 : floats_of(i + 1);  // the last one is the output
      auto found = std::find_if(free.begin(), free.end(), [&](int64_t slot) { return slot_floats[slot] >= size; });
      if (found != free.end()) {
        slot_of[i + 1] = *found;
        free.erase(found);
      } else {
        slot_of[i + 1] = static_cast<int64_t>(slot_floats.size());
        slot_floats.push_back(size);
      }
      scratch_ = std::max(scratch_, steps_[i]->scratch);
      for (int64_t value = 1; value <= i; ++value) {
        if (last[value] == i) free.push_back(slot_of[value]);
      }
    }
    scratch_ = divide_up(scratch_, 16) * 16;
    std::vector<int64_t> start;
    for (const int64_t size : slot_floats) {
      start.push_back(arena_);
      arena_ += divide_up(size, 16) * 16;
    }
    place_.assign(values, 0);
    for (int64_t value = 1; value < values; ++value) place_[value] = start[slot_of[value]];
    return sampled;
  }

  // An empty tensor where the sources are not what they were, or an output is not finite.
  Tensor run(const Tensor& x) const {
    STD_TORCH_CHECK(witness_, "the program is not finished");
    const float* x_data = fp32(nhwc(x, "x"));
    for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(x.size(d) == shapes_[0][d], "x has another shape");
    const std::vector<int64_t>& out = shapes_.back();
    Tensor y = out.size() == 2 ? torch::stable::empty({out[0], out[1]}, ScalarType::Float)
                               : cached_empty(out[0], out[1], out[2], out[3], ScalarType::Float, true);
    float* y_data = static_cast<float*>(y.mutable_data_ptr());
    const int64_t threads = torch::stable::get_num_threads(), count = static_cast<int64_t>(steps_.size());
    const Scratch memory(arena_ + threads * scratch_);
    std::vector<Progress> progress(count + 1);
    progress[count].taken.reset(new std::atomic<bool>[witness_->tasks]());
    for (int64_t i = 0; i < count; ++i) progress[i].taken.reset(new std::atomic<bool>[steps_[i]->tasks]());
    std::atomic<bool> good{true};
    const auto value = [&](int64_t number) -> float* {
      if (number < 0) return nullptr;
      if (number == count) return y_data;
      return number == 0 ? const_cast<float*>(x_data) : memory.data() + place_[number];
    };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
      float* scratch = memory.data() + arena_ + thread * scratch_;
      const auto work_on = [&](const Step& step, Progress* at, Work work) {
        int64_t finished = 0;
        for (int64_t k = 0; k < step.tasks; ++k) {
          const int64_t task = (thread * step.tasks / threads + k) % step.tasks;  // mostly the same part every time
          std::atomic<bool>& taken = at->taken[task];
          if (taken.load(std::memory_order_relaxed) || taken.exchange(true, std::memory_order_relaxed)) continue;
          work.first = finished++ == 0;
          if (!step.run(task, work)) good.store(false, std::memory_order_relaxed);
        }
        if (finished) at->done.fetch_add(finished, std::memory_order_release);
      };
      work_on(*witness_, &progress[count], {});
      for (int64_t i = 0; i < count && good.load(std::memory_order_relaxed); ++i) {
        const Step& step = *steps_[i];
        work_on(step, &progress[i], {value(step.x), value(step.residual), value(i + 1), scratch, false});
        for (int spins = 0; progress[i].done.load(std::memory_order_acquire) < step.tasks; ++spins) {
          if (!good.load(std::memory_order_relaxed)) break;
          if (spins > 2000) std::this_thread::yield();
        }
      }
    });
    return good ? y : torch::stable::empty({0}, ScalarType::Float);
  }

 private:
  const std::vector<int64_t>& shape(int64_t number) const {
    STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(numbers_.size()), "no such value");
    STD_TORCH_CHECK(shapes_[numbers_[number]].size() == 4, "the value is no activation");
    return shapes_[numbers_[number]];
  }
  int64_t floats_of(int64_t value) const {
    int64_t product = 1;
    for (const int64_t size : shapes_[value]) product *= size;
    return product;
  }
  void add_at(std::unique_ptr<Step> step, int64_t x, int64_t residual, std::vector<int64_t> out) {
    step->x = x;
    step->residual = residual;
    steps_.push_back(std::move(step));
    numbers_.push_back(static_cast<int64_t>(shapes_.size()));
    shapes_.push_back(std::move(out));
  }
  void add(std::unique_ptr<Step> step, int64_t x, int64_t residual, std::vector<int64_t> out) {
    add_at(std::move(step), numbers_[x], residual < 0 ? -1 : numbers_[residual], std::move(out));
  }

  int64_t threads_;
  std::vector<std::unique_ptr<Step>> steps_;  // step i makes value i + 1; value 0 is the input
  std::unique_ptr<WitnessStep> witness_;
  std::vector<std::vector<int64_t>> shapes_;  // of the values
  std::vector<int64_t> numbers_{0};           // the values that the caller knows
  std::vector<int64_t> place_;                // of the values in the arena
  int64_t arena_ = 0, scratch_ = 0;           // floats; scratch: of a thread
};

// Programs by number: an op takes and gives tensors and numbers.
class Programs {
 public:
  int64_t add(std::shared_ptr<Program> program) {
    const std::lock_guard<std::mutex> lock(mutex_);
    programs_[++last_] = std::move(program);
    return last_;
  }
  std::shared_ptr<Program> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(number);
    STD_TORCH_CHECK(found != programs_.end(), "no program ", number);
    return found->second;
  }
  void remove(int64_t number) {
    std::shared_ptr<Program> removed;  // destroyed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(number);
    if (found == programs_.end()) return;
    removed = std::move(found->second);
    programs_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Program>> programs_;
  int64_t last_ = 0;
};

Programs& programs() {
  static Programs* const all = new Programs;  // never destroyed: tensors in it may outlive torch
  return *all;
}

int64_t program_new(const std::vector<int64_t>& x) { return programs().add(std::make_shared<Program>(x)); }
bool program_conv(int64_t program, int64_t x, int64_t residual, const Tensor& packed,
                  const std::vector<int64_t>& weight, const OptionalTensor& bias, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool relu,
                  int64_t method) {
  return programs().get(program)->add_conv(x, residual, packed, weight, bias, stride, padding, dilation, relu, method);
}
void program_zero_pad(int64_t program, int64_t x, int64_t channels, int64_t stride) {
  programs().get(program)->add_zero_pad(x, channels, stride);
}
void program_classify(int64_t program, int64_t x, const Tensor& weight, const OptionalTensor& bias) {
  programs().get(program)->add_classify(x, weight, bias);
}
std::vector<int64_t> program_finish(int64_t program, const std::vector<Tensor>& sources) {
  return programs().get(program)->finish(sources);
}
Tensor program_run(int64_t program, const Tensor& x) { return programs().get(program)->run(x); }
void program_delete(int64_t program) { programs().remove(program); }

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def("program_new(int[] x) -> int");
  m.def(
      "program_conv(int program, int x, int residual, Tensor packed, int[] weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, bool relu, int method) -> bool");
  m.def("program_zero_pad(int program, int x, int channels, int stride) -> ()");
  m.def("program_classify(int program, int x, Tensor weight, Tensor? bias) -> ()");
  m.def("program_finish(int program, Tensor[] sources) -> int[]");
  m.def("program_run(int program, Tensor x) -> Tensor");
  m.def("program_delete(int program) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) {
  m.impl("program_new", TORCH_BOX(&fastres::program_new));
  m.impl("program_zero_pad", TORCH_BOX(&fastres::program_zero_pad));
  m.impl("program_delete", TORCH_BOX(&fastres::program_delete));
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("program_conv", TORCH_BOX(&fastres::program_conv));
  m.impl("program_classify", TORCH_BOX(&fastres::program_classify));
  m.impl("program_finish", TORCH_BOX(&fastres::program_finish));
  m.impl("program_run", TORCH_BOX(&fastres::program_run));
}
