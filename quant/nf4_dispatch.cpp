#include "quant/nf4_dispatch.h"

#include <limits>
#include <map>
#include <mutex>
#include <string_view>

#include "quant/nf4_dispatch_table.h"

namespace qlab {
namespace {

constexpr int64_t any = std::numeric_limits<int64_t>::max();
constexpr Nf4Line lines[] = {
    {"", Op::transpose, 1 << 13, 1 << 12, 1, Nf4Kernel::simt},
    {"", Op::transpose, 1 << 13, 1 << 12, 64, Nf4Kernel::mma},
    {"", Op::transpose, any, 1, 64, Nf4Kernel::mma},
    {"", Op::none, any, 1, 64, Nf4Kernel::mma},
#include "quant/nf4_dispatch_table.inc"
};

/// A kernel for Hopper that was faster on an H100 than mma and than decoding first, if any: lut
/// with every matrix at 1, 4 and 8 rows, all that it takes; those of warpgroups at 64, 128, 256,
/// 512 and 1,024 rows, with 4,096 and with 14,336 outputs. How many blocks there are decides, not
/// the size of the matrix; below 33 rows mma is faster, by interpolation.
std::optional<Nf4Kernel> hopper_kernel(Op op, int64_t outputs, int64_t rows) {
  using enum Nf4Kernel;
  if (op == Op::transpose && rows <= cuda::nf4_lut_rows) return lut;
  if (rows <= 32) return std::nullopt;
  if (outputs >= 11264 && outputs <= 16896 && rows <= 512) return wgmma;
  if (outputs < 3072 || outputs > 4224) return std::nullopt;
  if (rows <= 128) return wgmma3;
  if (rows <= 512) return wgmma2;
  if (rows > 768 && rows <= 1024) return wgmma;
  return std::nullopt;
}

/// As the table calls it: "" where it has no lines, and for a GPU that is not there.
std::string_view known_gpu(int index) {
  static std::mutex mutex;
  static std::map<int, std::string_view> known;
  const std::lock_guard lock(mutex);
  const auto [entry, created] = known.try_emplace(index, "");
  if (created && index < cuda::device_count()) {
    const std::string name = cuda::device_name(index);
    for (const Nf4Line& line : lines)
      if (line.gpu == name) entry->second = line.gpu;
  }
  return entry->second;
}

}  // namespace

std::optional<Nf4Kernel> kernel_of(std::span<const Nf4Line> lines, std::string_view gpu, Op op,
                                   int64_t n, int64_t k, int64_t rows) {
  const auto own = [&](const Nf4Line& line) { return line.gpu == gpu && line.op == op; };
  const auto itself = [&](const Nf4Line& line) { return line.n == n && line.k == k; };
  const int64_t wanted = n * k;
  const Nf4Line* like = nullptr;
  for (const Nf4Line& line : lines) {
    if (!own(line) || (like && itself(*like))) continue;
    const int64_t elements = line.n * line.k, best = like ? like->n * like->k : 0;
    const bool closer = best < wanted ? elements > best : elements >= wanted && elements < best;
    if (itself(line) || closer) like = &line;
  }
  if (!like) return std::nullopt;
  for (const Nf4Line& line : lines)
    if (own(line) && line.n == like->n && line.k == like->k && rows <= line.rows)
      return line.kernel;
  return std::nullopt;
}

std::optional<Nf4Kernel> fastest_nf4_kernel(std::string_view gpu, const Nf4Tensor& w, Op op,
                                            int64_t rows, DType dtype, Device device) {
  const auto supported = [&](Nf4Kernel kernel) {
    return nf4_matmul_supported(kernel, w, op, rows, dtype, device);
  };
  if (!gpu.empty()) {
    const auto measured = kernel_of(lines, gpu, op, w.shape[0], w.shape[1], rows);
    if (!measured || supported(*measured)) return measured;
  }
  const auto of_hopper = hopper_kernel(op, w.shape[op == Op::transpose ? 0 : 1], rows);
  if (of_hopper && supported(*of_hopper)) return of_hopper;
  const auto chosen = kernel_of(lines, "", op, w.shape[0], w.shape[1], rows);
  if (!chosen) return std::nullopt;
  // The other kernel needs no tensor cores.
  for (const Nf4Kernel kernel : {*chosen, Nf4Kernel::simt})
    if (supported(kernel)) return kernel;
  return std::nullopt;
}

std::optional<Nf4Kernel> fastest_nf4_kernel(const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                                            Device device) {
  if (device.target == DeviceType::cpu) return std::nullopt;
  const std::string_view gpu = device.capability == 0 ? known_gpu(device.index) : "";
  return fastest_nf4_kernel(gpu, w, op, rows, dtype, device);
}

}  // namespace qlab
