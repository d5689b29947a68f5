#include "quant/nf4_dispatch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>

namespace qlab {
namespace {

/// For one GPU's products with matrices of at most so many elements and so many rows.
struct Line {
  std::string_view gpu;  // "": any that has no lines
  Op op;
  int64_t elements, rows;
  std::optional<Nf4Kernel> kernel;
};
constexpr int64_t any = std::numeric_limits<int64_t>::max();
// A GPU's lines stand together, smaller matrices and fewer rows first.
constexpr Line lines[] = {
    {"", Op::transpose, 1 << 25, 1, Nf4Kernel::simt},
    {"", Op::transpose, 1 << 25, 64, Nf4Kernel::mma},
    {"", Op::transpose, any, 64, Nf4Kernel::mma},
    {"", Op::none, any, 64, Nf4Kernel::mma},
#include "quant/nf4_dispatch_table.inc"
};

/// As the table calls it: "" where it has no lines, and for a GPU that is not there.
std::string_view known_gpu(int index) {
  static std::mutex mutex;
  static std::map<int, std::string_view> known;
  const std::lock_guard lock(mutex);
  const auto [entry, created] = known.try_emplace(index, "");
  if (created && index < cuda::device_count()) {
    const std::string name = cuda::device_name(index);
    for (const Line& line : lines)
      if (line.gpu == name) entry->second = line.gpu;
  }
  return entry->second;
}

}  // namespace

std::optional<Nf4Kernel> fastest_nf4_kernel(const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                                            Device device) {
  if (device.target == DeviceType::cpu) return std::nullopt;
  const std::string_view gpu = device.capability == 0 ? known_gpu(device.index) : "";
  const auto own = [&](const Line& line) { return line.gpu == gpu && line.op == op; };
  int64_t elements = 0;  // of the smallest matrix measured that is no smaller, or of the largest
  for (const Line& line : lines)
    if (own(line) && elements < w.shape.numel()) elements = line.elements;
  for (const Line& line : lines) {
    if (!own(line) || line.elements != elements || rows > line.rows) continue;
    if (!line.kernel) return std::nullopt;
    // The other kernel needs no tensor cores.
    for (const Nf4Kernel kernel : {*line.kernel, Nf4Kernel::simt})
      if (nf4_matmul_supported(kernel, w, op, rows, dtype, device)) return kernel;
    return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace qlab
