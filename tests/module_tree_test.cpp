#include "nn/module_tree.h"

#include <gmock/gmock.h>

#include "data/file.h"
#include "nn/llama.h"
#include "tests/support/error_of.h"
#include "tests/support/files.h"

namespace qlab::test {
namespace {

using testing::HasSubstr;
using testing::Not;

const LlamaConfig llama = synthetic_config("llama-3.1-8b");

LoraSpec attention_r32() {
  LoraSpec spec;
  spec.r = 32;
  spec.alpha = 64;
  spec.dropout = 0.05;
  spec.pattern = "attention";
  return spec;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

// The text that PEFT 0.21 prints for Transformers 5.17's model, with Linear4bit in the layers as
// bitsandbytes puts it there, and SiLU() as most releases call it.
std::string golden_tree() {
  return read_text_file(golden("module_tree/llama-3.1-8b-r32-attention.txt"));
}

TEST(ModuleTree, IsWhatPeftPrints) {
  EXPECT_EQ(module_tree(llama, {WeightFormat::nf4}, attention_r32()), golden_tree());
}

TEST(ModuleTree, DropoutOfZeroIsTheIdentity) {
  LoraSpec spec = attention_r32();
  spec.dropout = 0;
  EXPECT_EQ(module_tree(llama, {WeightFormat::nf4}, spec),
            replaced(golden_tree(), "Dropout(p=0.05, inplace=False)", "Identity()"));
}

TEST(ModuleTree, OfAnUnquantizedBase) {
  const std::string plain = replaced(golden_tree(), "Linear4bit", "Linear");
  EXPECT_EQ(module_tree(llama, {WeightFormat::fp32}, attention_r32()), plain);
  EXPECT_EQ(module_tree(llama, {WeightFormat::bf16}, attention_r32()), plain);
}

TEST(ModuleTree, OfInt8) {
  EXPECT_EQ(module_tree(llama, {WeightFormat::int8}, attention_r32()),
            replaced(golden_tree(), "Linear4bit", "Linear8bitLt"));
}

TEST(ModuleTree, WithoutLora) {
  EXPECT_EQ(module_tree(synthetic_config("smollm2-135m"), {WeightFormat::nf4}, std::nullopt),
            R"(LlamaForCausalLM(
  (model): LlamaModel(
    (embed_tokens): Embedding(49152, 576)
    (layers): ModuleList(
      (0-29): 30 x LlamaDecoderLayer(
        (self_attn): LlamaAttention(
          (q_proj): Linear4bit(in_features=576, out_features=576, bias=False)
          (k_proj): Linear4bit(in_features=576, out_features=192, bias=False)
          (v_proj): Linear4bit(in_features=576, out_features=192, bias=False)
          (o_proj): Linear4bit(in_features=576, out_features=576, bias=False)
        )
        (mlp): LlamaMLP(
          (gate_proj): Linear4bit(in_features=576, out_features=1536, bias=False)
          (up_proj): Linear4bit(in_features=576, out_features=1536, bias=False)
          (down_proj): Linear4bit(in_features=1536, out_features=576, bias=False)
          (act_fn): SiLU()
        )
        (input_layernorm): LlamaRMSNorm((576,), eps=1e-05)
        (post_attention_layernorm): LlamaRMSNorm((576,), eps=1e-05)
      )
    )
    (norm): LlamaRMSNorm((576,), eps=1e-05)
    (rotary_emb): LlamaRotaryEmbedding()
  )
  (lm_head): Linear(in_features=576, out_features=49152, bias=False)
)
)");
}

// Equal neighbours are one entry; a layer on its own carries its index alone.
TEST(ModuleTree, LayersThatDifferBreakTheRun) {
  LoraSpec spec;
  spec.r = 2;
  spec.pattern = R"(model\.layers\.(5|30|31)\.mlp\.up_proj)";
  const std::string tree = module_tree(llama, {WeightFormat::nf4}, spec);
  for (const char* entry : {"(0-4): 5 x LlamaDecoderLayer(", "(5): LlamaDecoderLayer(",
                            "(6-29): 24 x LlamaDecoderLayer(", "(30-31): 2 x LlamaDecoderLayer("})
    EXPECT_THAT(tree, HasSubstr(entry));
  EXPECT_THAT(tree, Not(HasSubstr("32 x")));
}

TEST(ModuleTree, NamesAndBiasesOfQwen) {
  const std::string tree = module_tree(synthetic_config("qwen2.5-7b"), {WeightFormat::nf4}, {});
  EXPECT_THAT(tree, HasSubstr("(0-27): 28 x Qwen2DecoderLayer("));
  EXPECT_THAT(tree,
              HasSubstr("(q_proj): Linear4bit(in_features=3584, out_features=3584, bias=True)"));
  EXPECT_THAT(tree,
              HasSubstr("(k_proj): Linear4bit(in_features=3584, out_features=512, bias=True)"));
  EXPECT_THAT(tree,
              HasSubstr("(o_proj): Linear4bit(in_features=3584, out_features=3584, bias=False)"));
  EXPECT_THAT(tree, HasSubstr("Qwen2RMSNorm((3584,), eps=1e-06)"));
}

// The published figures of Llama-3.1-8B.
TEST(Footprint, OfLlama) {
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::fp32}, {}), 32'121'044'992);
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::bf16}, {}), 16'060'522'496);
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::int8}, {}), 9'081'200'640);
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::nf4}, {}), 5'591'539'712);
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::nf4, 64, false}, {}), 5'591'539'712);
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::nf4}, attention_r32()), 5'700'591'616);
  LoraSpec narrow = attention_r32();
  narrow.dtype = DType::bf16;
  EXPECT_EQ(hf_footprint(llama, {WeightFormat::nf4}, narrow), 5'591'539'712 + 54'525'952);
}

// Two kinds of total that happen to be equal: blocks of 64 of the linears, and bytes of this LoRA.
// So the split is tested, not the total alone.
TEST(Footprint, WithConstants) {
  constexpr int64_t blocks = 109'051'904, nested = 425'984, map = 256 * 4;
  const int64_t codes = 5'591'539'712;
  EXPECT_EQ(resident_bytes(llama, {WeightFormat::nf4}, {}), codes + blocks + 4 * nested + map);
  EXPECT_EQ(resident_bytes(llama, {WeightFormat::nf4, 64, false}, {}), 6'027'747'328);
  EXPECT_EQ(resident_bytes(llama, {WeightFormat::nf4, 128, false}, {}), codes + blocks / 2 * 4);
  EXPECT_EQ(resident_bytes(llama, {WeightFormat::bf16}, {}), 16'060'522'496);
  // One fp32 scale a row of q, k, v, o, gate, up, down.
  constexpr int64_t rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096);
  EXPECT_EQ(resident_bytes(llama, {WeightFormat::int8}, {}), 9'081'200'640 + 4 * rows);
}

TEST(Footprint, CountsParameters) {
  const ModelCount count = count_parameters(llama, attention_r32());
  EXPECT_EQ(count.linear, 6'979'321'856);
  EXPECT_EQ(count.trainable, 27'262'976);
  EXPECT_EQ(trainable_line(count),
            "trainable params: 27,262,976 || all params: 8,057,524,224 || trainable%: 0.3384");
  EXPECT_EQ(count_parameters(synthetic_config("smollm2-135m"), {}).all(), 134'515'008);
  EXPECT_EQ(count_parameters(synthetic_config("qwen2.5-7b"), {}).all(), 7'615'616'512);
  EXPECT_EQ(count_parameters(synthetic_config("llama-2-7b"), {}).all(), 6'738'415'616);
  EXPECT_EQ(with_commas(0), "0");
  EXPECT_EQ(with_commas(999), "999");
  EXPECT_EQ(with_commas(1000), "1,000");
}

TEST(Footprint, OfInt8OnADevice) {
  const Tensor w = Tensor::empty({4, 8}, DType::f32, Device::cpu());
  EXPECT_THAT(error_of([&] { Weight::from_dense(w, {WeightFormat::int8}); }),
              HasSubstr("use nf4, bf16, fp16 or fp32"));
}

// What the paper's rule says of a loaded model is what the allocator holds.
TEST(Footprint, IsWhatAModelOnMetaTakes) {
  const Device meta = Device::cpu().meta();
  const auto shapes = [&](const std::string&, const Shape& shape) {
    const MemoryTag tag(Category::workspace);
    return Tensor::empty(shape, DType::bf16, meta);
  };
  const MemoryAccount before = memory_account(meta);
  const Llama model(llama, {WeightFormat::nf4}, DType::bf16, meta, shapes);
  const MemoryAccount& after = memory_account(meta);
  int64_t held = 0;
  for (const Category c : {Category::weights, Category::constants}) {
    const int i = static_cast<int>(c);
    held += after.current[i] - before.current[i];
  }
  const int64_t norms_in_fp32 = 65 * 4096 * 2;
  EXPECT_NEAR(static_cast<double>(held - norms_in_fp32),
              static_cast<double>(resident_bytes(llama, {WeightFormat::nf4}, {})), 256 * 1024);
}

}  // namespace
}  // namespace qlab::test
