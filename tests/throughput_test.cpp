#include "experiments/throughput.h"

#include <gtest/gtest.h>

namespace qlab::test {
namespace {

// Names as drivers give them; a name is no part of a longer one.
TEST(Throughput, PeakOfAGpuByItsName) {
  const std::pair<const char*, double> known[] = {{"NVIDIA H100 80GB HBM3", 989.4},
                                                  {"NVIDIA H100 PCIe", 756},
                                                  {"NVIDIA H200", 989.4},
                                                  {"NVIDIA H20", 148},
                                                  {"NVIDIA GH200 480GB", 989.4},
                                                  {"NVIDIA A100-SXM4-80GB", 312},
                                                  {"NVIDIA A10", 125},
                                                  {"NVIDIA A10G", 70},
                                                  {"NVIDIA L4", 121},
                                                  {"NVIDIA L40", 181},
                                                  {"NVIDIA L40S", 362},
                                                  {"Tesla T4", 65},
                                                  {"NVIDIA GeForce RTX 3090", 71.2},
                                                  {"NVIDIA GeForce RTX 3090 Ti", 80},
                                                  {"NVIDIA GeForce RTX 4090", 165.2},
                                                  {"NVIDIA RTX A6000", 154.8}};
  for (const auto& [name, teraflops] : known)
    EXPECT_DOUBLE_EQ(peak_flops(name), teraflops * 1e12) << name;
  for (const char* unknown : {"NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400", "NVIDIA A1000",
                              "AMD EPYC (2 threads)", ""})
    EXPECT_EQ(peak_flops(unknown), 0) << unknown;
}

// 4 FLOP per weight and token of linear modules and lm_head, 6 T^2 per layer, head and its
// dimension.
TEST(Throughput, FlopsOfAModel) {
  LlamaConfig config;
  config.vocab_size = 10, config.hidden_size = 8, config.intermediate_size = 16;
  config.num_hidden_layers = 3, config.num_attention_heads = 2, config.num_key_value_heads = 1;
  config.head_dim = 4;
  const double layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16;
  EXPECT_DOUBLE_EQ(model_flops(config, 5), 5 * 4 * (3 * layer + 80) + 3 * 6 * 25 * 8);
}

TEST(Throughput, MedianOfAnEvenNumber) {
  EXPECT_EQ(median({7}), 7);
  EXPECT_EQ(median({9, 1, 4}), 4);
  EXPECT_EQ(median({4, 1, 10, 2}), 3);
}

}  // namespace
}  // namespace qlab::test
