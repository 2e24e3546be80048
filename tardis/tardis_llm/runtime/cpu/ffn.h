// Products and the folded FFN of batches that have been checked.
#pragma once
#include "interface.h"

namespace tardis {

void linear(const TardisMatrix& weight, const TardisVector& bias, const TardisBatch& batch);
void gemm(const TardisMatrix& weight, bool transposed, const TardisVector& bias, const TardisBatch& batch);
void fixed(const TardisFFN& ffn, const TardisBatch& batch);
void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch);
bool has_exact(const TardisFFN& ffn);
void exact_ffn(const TardisFFN& ffn, const TardisVector& b2, const TardisBatch& batch);

}  // namespace tardis
