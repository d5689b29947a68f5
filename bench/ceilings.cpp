#include "bench/ceilings.h"

#include <algorithm>
#include <map>

#include "bench/support.h"
#include "core/ops/copy.h"
#include "core/ops/gemm.h"

namespace qlab::bench {
namespace {

double median_of(const Case& c, int samples) {
  return time_calls(
             c, [&] { return samples-- > 0; }, [](double) {})
      .median();
}

/// The best of the library's copy and a kernel of ours that only copies.
double copy_rate(Device device) {
  const int64_t bytes = device.is_cuda() ? int64_t{1} << 30 : int64_t{1} << 27;
  const Tensor from = random({bytes / 4}, DType::f32, device);
  const Tensor to = Tensor::empty(from.shape(), DType::f32, device);
  const auto seconds = [&](const std::function<void()>& run) {
    const Case c{.device = device,
                 .call =
                     [&](int) {
                       run();
                       return std::vector{to};
                     },
                 .clock = Clock::stream};
    return median_of(c, 11);
  };
  double best = seconds([&] { copy(to, from); });
  if (device.is_cuda()) best = std::min(best, seconds([&] { cuda::cast(to, from); }));
  return 2 * static_cast<double>(bytes) / best;
}

double product_rate(Device device) {
  const int64_t n = device.is_cuda() ? 8192 : 2048;
  const Tensor a = random({n, n}, compute_dtype(device), device);
  const Tensor b = random({n, n}, compute_dtype(device), device);
  const auto product = [](const Tensor& x, const Tensor& w) {
    return std::vector{matmul_nt(x, w)};
  };
  const Tensor dry = Tensor::empty({n, n}, a.dtype(), device.meta());
  const Case c{.device = device,
               .dry = [&] { product(dry, dry); },
               .call = [&](int) { return product(a, b); }};
  const double cube = static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  return 2 * cube / median_of(c, device.is_cuda() ? 11 : 5);
}

double bus_rate(Device device, bool to_device) {
  constexpr size_t bytes = size_t{1} << 28;
  void* const host = cuda::allocate_pinned(bytes);
  QLAB_CHECK(host != nullptr, "no page-locked memory for the ceilings");
  const Tensor on_device = Tensor::zeros({static_cast<int64_t>(bytes)}, DType::u8, device);
  const Case c{.device = device, .call = [&](int) {
                 if (to_device)
                   cuda::copy_async(on_device.raw(), host, bytes);
                 else
                   cuda::copy_async(host, on_device.raw(), bytes);
                 return std::vector<Tensor>{};
               }};
  const double rate = static_cast<double>(bytes) / median_of(c, 7);
  cuda::release_pinned(host);
  return rate;
}

void show(benchmark::State& state, double amount, const char* unit, double scale, double rate) {
  for (auto _ : state) state.SetIterationTime(amount / rate);
  state.counters[unit] = rate * scale;
}

const Register registered(0, [] {
  for (const Device device : devices()) {
    const auto ceiling = [&](const char* what, double Ceilings::*member, const char* unit,
                             double scale) {
      benchmark::RegisterBenchmark(name(device, what).c_str(),
                                   [=](benchmark::State& state) {
                                     const double rate = ceilings(device).*member;
                                     show(state, 1 / scale, unit, scale, rate);
                                   })
          ->UseManualTime()
          ->Iterations(1);
    };
    ceiling("ceiling/copy", &Ceilings::copy, "GB/s", 1e-9);
    ceiling("ceiling/product", &Ceilings::product, "TFLOP/s", 1e-12);
    if (device.is_cpu()) continue;
    ceiling("ceiling/host_to_device", &Ceilings::host_to_device, "GB/s", 1e-9);
    ceiling("ceiling/device_to_host", &Ceilings::device_to_host, "GB/s", 1e-9);
  }
});

}  // namespace

const Ceilings& ceilings(Device device) {
  static std::map<DeviceType, Ceilings> measured;
  const auto [entry, fresh] = measured.try_emplace(device.type);
  if (fresh) {
    Ceilings& c = entry->second;
    c.copy = copy_rate(device);
    c.product = product_rate(device);
    if (device.is_cuda()) {
      c.host_to_device = bus_rate(device, true);
      c.device_to_host = bus_rate(device, false);
    }
  }
  return entry->second;
}

}  // namespace qlab::bench
