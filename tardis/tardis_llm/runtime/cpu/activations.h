// The activations that can be folded. NaN stays NaN.
#pragma once
#include "interface.h"

#include <math.h>

namespace tardis {

static inline float xielu(const TardisActivation& of, float z) {
    if (z > 0) return z * (of.alpha_p * z + of.beta);
    return of.alpha_n * (expm1f(z < of.eps ? z : of.eps) - z) + of.beta * z;
}

static inline float activate(const TardisActivation& activation, float z) {
    switch (activation.kind) {
        case TARDIS_GELU: return 0.5f * z * erfcf(-0.70710678f * z);
        case TARDIS_GELU_TANH: return 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
        case TARDIS_QUICK_GELU: return z / (1 + expf(-1.702f * z));
        case TARDIS_SILU: return z / (1 + expf(-z));
        case TARDIS_RELU2: return z < 0 ? 0 : z * z;
        case TARDIS_XIELU: return xielu(activation, z);
        default: return z < 0 ? 0 : z;
    }
}

}  // namespace tardis
