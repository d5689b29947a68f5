#include "experiments/cost_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <iterator>

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
};
constexpr double other_share = 0.85;

/// Over the bus, by the share of its rate in one direction. `beside`: on a stream of its own.
struct Transfer {
  const char* operation;
  double share;
  bool beside;
};
constexpr double h100_bus = 54.8e9;
constexpr Transfer transfers[] = {
    {"offload", 1, true},
    {"streamed layer", 1, true},
    {"page", 104e9 / h100_bus, true},  // in and out at once
    // Gathered by the host, then copied: 7 ms for 67 MB (bench/results/budget.json, 9 and 10 GiB).
    {"embedding rows", 9.3e9 / h100_bus, false},
};

// Dense bf16 (fp16 on a T4) TFLOP/s with fp32 sums, GB/s of memory, and of the bus in one
// direction, by the makers' datasheets.
struct Sheet {
  const char* name;
  double tflops, gbytes, bus;
};
constexpr Sheet sheets[] = {
    {"h100", 989.4, 3350, 63},    {"h200", 989.4, 4800, 63},    {"a100-40gb", 312, 1555, 31.5},
    {"a100", 312, 2039, 31.5},    {"l40s", 362, 864, 31.5},     {"l4", 121, 300, 31.5},
    {"a10g", 70, 600, 31.5},      {"rtx3090", 71.2, 936, 31.5}, {"rtx4090", 165.2, 1008, 31.5},
    {"rtx5090", 209.5, 1792, 63}, {"t4", 65, 320, 15.75}};

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
  for (const Sheet& sheet : sheets) {
    const size_t at = text.find(sheet.name), end = at + std::string_view(sheet.name).size();
    const bool longer = at != text.npos && end < text.size() && std::isdigit(text[end]) != 0;
    if (at != text.npos && !longer)  // an L40 is no L4
      return {h100_products * sheet.tflops / h100.tflops,
              h100_copy * sheet.gbytes / h100.gbytes,
              3e-6,
              &sheet == &h100,
              h100_bus * sheet.bus / h100.bus,
              &sheet != &h100};
  }
  return {h100_products, h100_copy, 3e-6, false, h100_bus};
}

// 65 GFLOP/s a core in the training step of SmolLM2 on an AMD EPYC (bench/results/cpu_step.json).
Rates cpu_rates(int threads) { return {65e9 * threads, 10e9, 2e-6, false, 10e9}; }

Rates rates_of(Device device) {
  return device.target == DeviceType::cuda ? gpu_rates(device_description(device))
                                           : cpu_rates(thread_count());
}

std::map<int, PartSeconds> part_seconds(const std::vector<ProfileLine>& work, const Rates& rates) {
  std::map<int, PartSeconds> parts;
  const auto named = [](const auto& list, const std::string& name) {
    const auto end = std::end(list);
    const auto it =
        std::find_if(std::begin(list), end, [&](const auto& s) { return name == s.operation; });
    return it == end ? nullptr : it;
  };
  for (const ProfileLine& line : work) {
    PartSeconds& part = parts[line.part];
    const double launches = static_cast<double>(line.calls) * rates.launch;
    if (const Transfer* transfer = named(transfers, line.name)) {
      const double seconds = line.work.bytes / (rates.bus * transfer->share) + launches;
      part.bus += seconds;
      if (!transfer->beside) part.stream += seconds;
      continue;
    }
    const Share* share = named(shares, line.name);
    const double by_flops = share != nullptr && share->flops > 0
                                ? line.work.flops / (rates.product_flops * share->flops)
                                : 0;
    const double byte_share = share != nullptr ? share->bytes : other_share;
    const double by_bytes = byte_share > 0 ? line.work.bytes / (rates.bytes * byte_share) : 0;
    part.stream += std::max(by_flops, by_bytes) + launches;
  }
  return parts;
}

std::string duration_text(double seconds) {
  struct Unit {
    double below, seconds;
    const char* name;
  };
  constexpr Unit units[] = {{0.1, 1e-3, "ms"}, {60, 1, "s"}, {3600, 60, "min"}, {1e300, 3600, "h"}};
  const Unit& unit = *std::find_if(std::begin(units), std::end(units) - 1,
                                   [&](const Unit& u) { return seconds < u.below; });
  const double value = seconds / unit.seconds;
  return value < 100 ? fmt::format("{:.3g} {}", value, unit.name)
                     : fmt::format("{:.0f} {}", value, unit.name);
}

double predicted_seconds(const std::vector<ProfileLine>& work, const Rates& rates) {
  double seconds = 0;
  for (const auto& [number, part] : part_seconds(work, rates))
    seconds += std::max(part.stream, part.bus);
  return seconds;
}

}  // namespace qlab
