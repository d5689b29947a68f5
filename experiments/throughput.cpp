#include "experiments/throughput.h"

#include <algorithm>
#include <cctype>
#include <string_view>
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
  // The first name that occurs, as whole words, decides. TFLOP/s without sparsity, accumulating in
  // fp32; of the T4, which has no bf16, in fp16.
  constexpr std::pair<std::string_view, double> known[] = {{"H100 PCIe", 756},
                                                           {"H100 NVL", 835},
                                                           {"H100", 989.4},
                                                           {"GH200", 989.4},
                                                           {"H200", 989.4},
                                                           {"H20", 148},
                                                           {"A100", 312},
                                                           {"A10G", 70},
                                                           {"A10", 125},
                                                           {"RTX A6000", 154.8},
                                                           {"L40S", 362},
                                                           {"L40", 181},
                                                           {"L4", 121},
                                                           {"T4", 65},
                                                           {"RTX 3090 Ti", 80},
                                                           {"RTX 3090", 71.2},
                                                           {"RTX 4090 Laptop", 0},
                                                           {"RTX 4090 D", 0},
                                                           {"RTX 4090", 165.2},
                                                           {"RTX 5090 Laptop", 0},
                                                           {"RTX 5090 D", 0},
                                                           {"RTX 5090", 209.5}};
  const auto whole_words = [&](std::string_view name) {
    const auto is_part = [&](size_t i) {
      return i < device_name.size() && std::isalnum(static_cast<unsigned char>(device_name[i]));
    };
    for (size_t at = device_name.find(name); at != std::string::npos;
         at = device_name.find(name, at + 1))
      if ((at == 0 || !is_part(at - 1)) && !is_part(at + name.size())) return true;
    return false;
  };
  for (const auto& [name, teraflops] : known)
    if (whole_words(name)) return teraflops * 1e12;
  return 0;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

}  // namespace qlab
