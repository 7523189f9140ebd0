// Column scaling of GEMMs in fixed point: see QkvGemmKernels::scales_k.
#pragma once

#include <cstdint>

namespace casvit {

// to[i] = the largest magnitude of column (row) i of a dense matrix, for i in [begin, end); 1 for
// columns past the end.
void column_maxima(const float* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                   float* to);
void row_maxima(const float* matrix, int64_t columns, int64_t begin, int64_t end, float* to);
// Floats of a k_scale for GEMMs of depth K; those past K are 1.
inline int64_t padded_k_scales(int64_t K) { return (K + 63) / 64 * 64; }

}  // namespace casvit
