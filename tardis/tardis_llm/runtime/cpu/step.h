// The operations of a decoding step that have been checked.
#pragma once
#include "interface.h"
#include "threads.h"

namespace tardis {

constexpr int64_t kMaxProducts = 4;  // of one operation
constexpr int64_t kMaxHead = 512;    // numbers of a head

// x and y of the batch are those of the operation.
void run(const TardisOperation& op, const TardisBatch& batch, int64_t position);

// Whether it reads many weights.
bool reads_weights(const TardisOperation& op);

// What a thread of a team reads first of the weights of an operation that does.
Stretch first_read(const TardisOperation& op, const TardisBatch& batch, int thread);

}  // namespace tardis
