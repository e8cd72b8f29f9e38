// The end of a classifier: logits = weight * mean over pixels(x) + bias, in float64.
#pragma once

#include <cstdint>

namespace fastres {

struct Classifier {
  int64_t pixels, channels, classes;
  const float* weight;  // [classes][channels]
  const float* bias;    // or null
};

// Images [begin, end) of NHWC activations x to y [images][classes].
void classify(const Classifier& c, const float* x, int64_t begin, int64_t end, float* y);

}  // namespace fastres
