// Numbers of the type that tensors of a batch have.
#pragma once
#include "dispatch.h"

namespace tardis {

// Numbers of some rows, in fp32 and back. A number that is stored is rounded to the type.
class Number {
public:
    explicit Number(int32_t type) : type_(type) {}

    void load(const TardisRows& rows, int64_t token, int64_t first, int64_t count, float* out) const {
        kernels().widen({rows.data, type_, 0}, token * rows.stride + first, count, out);
    }
    void keep(const TardisRows& rows, int64_t token, int64_t first, int64_t count, const float* values) const {
        kernels().store({rows.data, type_, 0}, token * rows.stride + first, count, values, nullptr);
    }
    void round(float* values, int64_t count) const {
        if (type_ == TARDIS_BF16)
            for (int64_t i = 0; i < count; ++i) values[i] = from_bf16(to_bf16(values[i]));
        else if (type_ == TARDIS_FP16)
            for (int64_t i = 0; i < count; ++i) values[i] = from_fp16(to_fp16(values[i]));
    }
    // Up-projections become the hidden activations of their neurons: activation(x), times other if there is one.
    void hide(const TardisActivation& activation, float* x, const float* other, int64_t count) const {
        kernels().activate(activation, x, count);
        if (!other) return;
        round(x, count);
        for (int64_t i = 0; i < count; ++i) x[i] *= other[i];
    }

private:
    int32_t type_;
};

}  // namespace tardis
