// Products, rounding, and the folded FFN of batches that have been checked.
#pragma once
#include "interface.h"
#include "threads.h"

namespace tardis {

void linear(const TardisMatrix& weight, const TardisVector& bias, const TardisBatch& batch);
void gemm(const TardisMatrix& weight, bool transposed, const TardisVector& bias, const TardisBatch& batch);
void fixed(const TardisFFN& ffn, const TardisBatch& batch);
void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch);
void head(const TardisHead& head, const TardisBatch& batch);
void round_columns(const TardisRounding& rounding, int threads);
// What a thread of a team reads first of a folded FFN, or of a head, no more than so many bytes.
Stretch first_of_folded(const TardisFFN& ffn, const TardisBatch& batch, int thread, int64_t most);
Stretch first_of_head(const TardisHead& head, const TardisBatch& batch, int thread, int64_t most);
bool has_exact(const TardisFFN& ffn);
void exact_ffn(const TardisFFN& ffn, const TardisVector& b2, const TardisBatch& batch);

}  // namespace tardis
