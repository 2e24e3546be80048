// Attention of one token for each sequence to all that came before it.
#pragma once
#include "interface.h"

namespace tardis {

void attend(const TardisAttention& of, const TardisOperation& op, const TardisBatch& batch, int64_t position);

}  // namespace tardis
