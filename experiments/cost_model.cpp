#include "experiments/cost_model.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <map>
#include <string_view>

#include "core/parallel.h"

namespace qlab {
namespace {

// Seen on an H100 80GB HBM3 (docs/performance.md): the rate of all products of an 8B step, a copy,
// and of each operation the share of the one or the other.
constexpr double h100_products = 684e12, h100_copy = 2.97e12;
struct Share {
  const char* operation;
  double flops, bytes;  // share of the rate; 0: does not bind
};
/// Copied on streams of their own: they share the bus, and overlap with the rest of their part.
constexpr std::string_view beside[] = {"streamed layer", "offload"};
constexpr Share shares[] = {
    {"product", 1.0, 0},
    {"product with an adapter or few rows", 0, 0.77},
    {"attention", 561.0 / 684, 0},
    {"attention_backward", 415.0 / 684, 0},
    {"dequantize_nf4", 0, 0.93},
    {"rms_norm", 0, 0.9},
    {"rms_norm_backward", 0, 0.9},
    {"rope", 0, 0.9},
    {"swiglu", 0, 1.0},
    {"swiglu_backward", 0, 1.0},
    {"adapter_backward", 0, 0.74},
    {"adapter with dropout", 0, 0.41},
    {"dropout", 0, 0.92},
    {"dropout_add", 0, 0.92},
    {"adamw", 0, 0.97},
    {"adamw8bit", 0, 0.37},
    {"offload", 0, 54.8e9 / 2.97e12},  // pinned memory over PCIe
    {"streamed layer", 0, 54.8e9 / 2.97e12},
    {"page", 0, 104e9 / 2.97e12},  // in and out at once
};
constexpr double other_share = 0.85;

// Dense bf16 (fp16 on a T4) TFLOP/s with fp32 sums and GB/s, by the makers' datasheets.
struct Sheet {
  const char* name;
  double tflops, gbytes;
};
constexpr Sheet sheets[] = {
    {"h100", 989.4, 3350},    {"h200", 989.4, 4800},  {"a100-40gb", 312, 1555},
    {"a100", 312, 2039},      {"l40s", 362, 864},     {"l4", 121, 300},
    {"a10g", 70, 600},        {"rtx3090", 71.2, 936}, {"rtx4090", 165.2, 1008},
    {"rtx5090", 209.5, 1792}, {"t4", 65, 320}};

std::string plain(const std::string& name) {  // "NVIDIA GeForce RTX 4090" as "rtx4090" has it
  std::string out;
  for (const char c : name)
    if (c != ' ') out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

}  // namespace

Rates gpu_rates(const std::string& name) {
  const std::string text = plain(name);
  const Sheet& h100 = sheets[0];
  for (const Sheet& sheet : sheets)
    if (text.find(sheet.name) != std::string::npos)
      return {h100_products * sheet.tflops / h100.tflops, h100_copy * sheet.gbytes / h100.gbytes,
              3e-6, &sheet == &h100};
  return {h100_products, h100_copy, 3e-6, false};
}

// 65 GFLOP/s a core in the training step of SmolLM2 on an AMD EPYC (bench/results/cpu_step.json).
Rates cpu_rates(int threads) { return {65e9 * threads, 10e9, 2e-6, false}; }

Rates rates_of(Device device) {
  return device.target == DeviceType::cuda ? gpu_rates(device_description(device))
                                           : cpu_rates(thread_count());
}

double predicted_seconds(const std::vector<ProfileLine>& work, const Rates& rates) {
  struct Part {
    double compute = 0, copies = 0;
  };
  std::map<int, Part> parts;
  for (const ProfileLine& line : work) {
    const auto* share = std::find_if(std::begin(shares), std::end(shares),
                                     [&](const Share& s) { return line.name == s.operation; });
    const bool known = share != std::end(shares);
    const double by_flops =
        known && share->flops > 0 ? line.work.flops / (rates.product_flops * share->flops) : 0;
    const double byte_share = known ? share->bytes : other_share;
    const double by_bytes = byte_share > 0 ? line.work.bytes / (rates.bytes * byte_share) : 0;
    Part& part = parts[line.part];
    const bool copied =
        std::find(std::begin(beside), std::end(beside), line.name) != std::end(beside);
    (copied ? part.copies : part.compute) +=
        std::max(by_flops, by_bytes) + static_cast<double>(line.calls) * rates.launch;
  }
  double seconds = 0;
  for (const auto& [number, part] : parts) seconds += std::max(part.compute, part.copies);
  return seconds;
}

}  // namespace qlab
