// The activations that can be folded, by their places in ACTIVATIONS of activations.py. NaN stays NaN.
#pragma once
#include <math.h>
#include <stdint.h>

namespace tardis {

enum Activation : int32_t { kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu, kRelu2, kActivations };

static inline float activate(int32_t activation, float z) {
    switch (activation) {
        case kGelu: return 0.5f * z * erfcf(-0.70710678f * z);
        case kGeluTanh: return 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
        case kQuickGelu: return z / (1 + expf(-1.702f * z));
        case kSilu: return z / (1 + expf(-z));
        case kRelu2: return z < 0 ? 0 : z * z;
        default: return z < 0 ? 0 : z;
    }
}

}  // namespace tardis
