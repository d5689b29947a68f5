#include "experiments/profile_table.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/ops/copy.h"
#include "core/ops/gemm.h"
#include "core/random.h"

namespace qlab {
namespace {

/// The median of seven, after two that warm up.
template <class F>
double seconds_of(const F& issue) {
  issue(), issue();
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    cuda::clear_marks();
    const int64_t start = cuda::mark();
    issue();
    times.push_back(cuda::seconds_between(start, cuda::mark()));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

Tensor random_matrix(int64_t n, uint64_t key, DType dtype, Device device) {
  std::vector<bf16> values(static_cast<size_t>(n * n));
  for (size_t i = 0; i < values.size(); i += 4) {
    const Philox random = philox(key, static_cast<uint32_t>(i), 0, 0, 0);
    for (size_t j = 0; j < 4; ++j)
      values[i + j] = static_cast<bf16>(uniform(random.lane[j]) - 0.5f);
  }
  return cast(Tensor::from_vector(values, {n, n}, device), dtype);
}

}  // namespace

Ceilings measure_ceilings(Device device) {
  Ceilings ceilings;
  const MemoryTag tag(Category::workspace);
  {
    constexpr int64_t bytes = int64_t{1} << 30;
    const Tensor from = Tensor::zeros({bytes}, DType::u8, device);
    const Tensor to = Tensor::empty({bytes}, DType::u8, device);
    ceilings.bytes_per_s = 2.0 * static_cast<double>(bytes) / seconds_of([&] { copy(to, from); });
  }
  constexpr int64_t n = 8192;
  const DType dtype = cuda::supports_bf16(device.index) ? DType::bf16 : DType::f16;
  const Tensor a = random_matrix(n, 1, dtype, device), b = random_matrix(n, 2, dtype, device);
  const Tensor c = Tensor::empty({n, n}, dtype, device);
  const double flops = 2.0 * static_cast<double>(n * n) * static_cast<double>(n);
  ceilings.flops_per_s = flops / seconds_of([&] { gemm(c, a, Op::none, b, Op::transpose); });
  return ceilings;
}

std::string profile_table(const Profile& profile, const Ceilings& ceilings) {
  std::string text = fmt::format(
      "one step: {:.2f} ms; ceilings measured now: {:.0f} TFLOP/s, {:.2f} TB/s\n"
      "{:<34} {:>6} {:>10} {:>7} {:>16} {:>11}\n",
      profile.seconds * 1e3, ceilings.flops_per_s * 1e-12, ceilings.bytes_per_s * 1e-12,
      "operation", "calls", "ms", "share", "achieved", "of ceiling");
  double inside = 0;
  for (const ProfileLine& l : profile.lines) {
    inside += l.seconds;
    const bool computes = l.work.flops / ceilings.flops_per_s > l.work.bytes / ceilings.bytes_per_s;
    const double rate = (computes ? l.work.flops : l.work.bytes) / l.seconds;
    text += fmt::format("{:<34} {:>6} {:>10.3f} {:>6.1f}% {:>9.1f} {:<6} {:>10.0f}%\n", l.name,
                        l.calls, l.seconds * 1e3, 100 * l.seconds / profile.seconds,
                        rate * (computes ? 1e-12 : 1e-9), computes ? "TFLOP/s" : "GB/s",
                        100 * rate / (computes ? ceilings.flops_per_s : ceilings.bytes_per_s));
  }
  text += fmt::format("{:<34} {:>6} {:>10.3f} {:>6.1f}%\n", "between operations", "",
                      (profile.seconds - inside) * 1e3,
                      100 * (profile.seconds - inside) / profile.seconds);
  return text;
}

}  // namespace qlab
