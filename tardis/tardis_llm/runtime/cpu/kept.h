// The neurons of a folded FFN that are always computed.
#pragma once
#include "input.h"
#include "numbers.h"

#include <optional>

namespace tardis {

// There may be none: then there are no tasks, and nothing is added.
class Kept {
public:
    // inputs: of the FFN.
    Kept(const TardisFFN& ffn, const TardisBatch& batch, Inputs& inputs, int threads);

    // Of `hide`, in any order and on any thread; `gather`, which allocates, is next; and then `add`, on any thread.
    int64_t tasks() const;
    // The hidden activations of some neurons.
    void hide(int64_t task) const;
    void gather();
    // What they add to the outputs begin..end-1, kBlockRows at most: out[token * kBlockRows + i - begin] += ...
    void add(int64_t begin, int64_t end, float* out) const;

private:
    const TardisFFN& ffn_;
    const TardisBatch& batch_;
    const int64_t count_, block_;  // neurons, and those of a task
    const Input& x_;
    TardisBatch hidden_;  // its inputs are the activations [tokens, count]
    std::optional<Inputs> inputs_;
    const Input* hidden_x_ = nullptr;
};

}  // namespace tardis
