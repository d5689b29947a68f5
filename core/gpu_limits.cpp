#include "core/gpu_limits.h"

namespace qlab {
namespace {

bool for_gpu(const Tensor& x) { return x.device().target == DeviceType::cuda; }

}  // namespace

void check_gpu_count(const char* op, const Tensor& x, const char* what, int64_t count,
                     int64_t most) {
  if (for_gpu(x) && count > most)
    fail("[{}] a GPU takes at most {} {}, got {}: {}", op, most, what, count, x.str());
}

void check_gpu_matrix(const char* op, const Tensor& x) {
  if (!for_gpu(x)) return;
  if (x.dtype() != DType::f32 && x.dtype() != DType::bf16 && x.dtype() != DType::f16)
    fail("[{}] a GPU takes float32, bfloat16 or float16, got {}", op, x.str());
  check_gpu_count(op, x, "rows", x.rows());
  check_gpu_count(op, x, "columns", x.cols());
}

void check_gpu_elements(const char* op, const Tensor& x) {
  check_gpu_count(op, x, "elements", x.numel(),
                  x.numel() % 8 == 0 ? 8 * largest_count : largest_count);
}

void check_gpu_rows(const char* op, const Tensor& x) {
  if (for_gpu(x) && !rows_aligned16(x))
    fail("[{}] a GPU takes rows that start at multiples of 16 bytes, got {}", op, x.str());
}

}  // namespace qlab
