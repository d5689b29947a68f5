#include "experiments/throughput.h"

#include <array>
#include <utility>

namespace qlab {

double model_flops(const LlamaConfig& config, int64_t length) {
  const auto d = [](int64_t n) { return static_cast<double>(n); };
  const double hidden = d(config.hidden_size), attended = d(config.q_size());
  const double layer =
      hidden * (2 * attended + 2 * d(config.kv_size())) + 3 * hidden * d(config.intermediate_size);
  const double weights = d(config.num_hidden_layers) * layer + d(config.vocab_size) * hidden;
  return d(length) * 4 * weights +
         d(config.num_hidden_layers) * 6 * d(length) * d(length) * attended;
}

double peak_flops(const std::string& device_name) {
  // The first name that occurs decides. TFLOP/s without sparsity, accumulating in fp32.
  constexpr std::array<std::pair<const char*, double>, 14> known = {{{"H100 PCIe", 756},
                                                                     {"H100 NVL", 835},
                                                                     {"H100", 989.4},
                                                                     {"H200", 989.4},
                                                                     {"H20", 148},
                                                                     {"A100", 312},
                                                                     {"A10G", 70},
                                                                     {"A10", 125},
                                                                     {"A6000", 154.8},
                                                                     {"L40S", 362},
                                                                     {"L4", 121},
                                                                     {"RTX 3090", 71.2},
                                                                     {"RTX 4090", 165.2},
                                                                     {"RTX 5090", 209.5}}};
  for (const auto& [name, teraflops] : known)
    if (device_name.find(name) != std::string::npos) return teraflops * 1e12;
  return 0;
}

}  // namespace qlab
