// Tables of single models: what is said of Llama-3.1-8B, Llama-2-7B and of fine-tuning 7B.
#include "experiments/memory_table_rows.h"

namespace qlab {
namespace {

using Sets = std::vector<std::string>;

const std::string held_here =
    "Ours is what the allocator holds for a run on a GPU, in blocks of 256 B. Beyond parameters "
    "that is quantization constants, norms in fp32 and, once sequences come in, rotary tables as "
    "long as they are.";

Sets with(Sets a, const Sets& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Sets one_sequence(int64_t length) {
  return {"train.batch_size=1", fmt::format("data.seq_len={}", length)};
}

std::string commas(double amount) { return with_commas(static_cast<int64_t>(amount)); }

}  // namespace

MemoryTable llama31_8b_table(RowMaker& make) {
  const std::string model = "synthetic:llama-3.1-8b";
  const Weights w(model);
  const Sets fp32 = {"quant.type=fp32", "quant.compute_dtype=fp32"};
  const Sets nf4 = {"quant.double_quant=false"}, nf4_dq = {};
  const Sets lora = with({"lora.r=32", "lora.targets=attention"}, one_sequence(512));
  const double parameters = w.lora(32, "attention");
  const std::vector<Share> adapter = {{share::lora, 4 * parameters}};
  const std::string linear_rest = " B a weight of the linear layers, 2 B of all others";
  MemoryTable t;
  t.title = "Llama-3.1-8B: its weights in five formats, and a LoRA";
  const auto add = [&](const Sets& sets, const Counted& counted, MemoryRow row) {
    t.rows.push_back(make.row(model, sets, counted, std::move(row)));
  };
  add(fp32, counted::base,
      {.what = "fp32",
       .published = printed("32.12 GB", Unit::GB),
       .rule = "4 B a parameter",
       .by_rule = by_weight(w, 4, 4)});
  add({"quant.type=bf16"}, counted::base,
      {.what = "bf16",
       .published = printed("16.06 GB", Unit::GB),
       .rule = "2 B a parameter",
       .by_rule = by_weight(w, 2, 2)});
  add({"quant.type=int8"}, counted::base,
      {.what = "int8 (LLM.int8 storage)",
       .published = printed("9.08 GB", Unit::GB),
       .rule = "1" + linear_rest,
       .by_rule = by_weight(w, 1, 2),
       .unmeasured = "bytes alone"});
  add(nf4, counted::base,
      {.what = "NF4",
       .published = printed("5.59 GB", Unit::GB),
       .rule = "0.5" + linear_rest + "; constants not counted",
       .by_rule = by_weight(w, 0.5, 2)});
  add(nf4_dq, counted::base,
      {.what = "NF4 + double quantization",
       .published = printed("5.59 GB", Unit::GB),
       .rule = "the same",
       .by_rule = by_weight(w, 0.5, 2)});
  add(lora, counted::base_and_adapters,
      {.what = "the same + LoRA r=32 on q, k, v, o",
       .published = printed("5.70 GB", Unit::GB),
       .rule = "and 4 B a LoRA parameter",
       .by_rule = joined(by_weight(w, 0.5, 2), adapter)});
  add(nf4, counted::base,
      {.what = "NF4, constants counted",
       .published = unread(""),
       .rule = "and an fp32 scale for 64 weights",
       .by_rule = nf4_by_rule(w, false, 2)});
  add(nf4_dq, counted::base,
      {.what = "NF4 + double quantization, constants counted",
       .published = unread(""),
       .rule = "and 1 B for 64 weights, an fp32 scale for 256 of those",
       .by_rule = nf4_by_rule(w, true, 2)});
  add(lora, counted::base_and_adapters,
      {.what = "the same + LoRA r=32, constants counted",
       .published = unread(""),
       .rule = "and 4 B a LoRA parameter",
       .by_rule = joined(nf4_by_rule(w, true, 2), adapter)});
  add(lora, counted::adapters,
      {.what = "LoRA r=32 on q, k, v, o (adapter_model.safetensors)",
       .unit = Unit::MB,
       .published = printed("109.1 MB", Unit::MB),
       .rule = "4 B a LoRA parameter",
       .by_rule = adapter});
  const auto trained = static_cast<double>(make.prediction(model, lora).trainable_params);
  t.rows.push_back({.what = "its parameters",
                    .unit = Unit::parameters,
                    .published = printed("27,262,976", Unit::parameters),
                    .rule = "r (in + out), summed over 128 matrices",
                    .by_rule = {{"parameters", parameters}},
                    .setting = arguments(model, lora),
                    .ours = {{"parameters", trained}}});
  t.sources = {
      "Published: what get_memory_footprint of Transformers gives for the model loaded with "
      "bitsandbytes, and with PEFT's adapter. Its rule, in its documentation: the bytes of all "
      "parameters and buffers.",
      "Formats: LLM.int8, Dettmers et al. 2022, arXiv 2208.07339; NF4 and double quantization, "
      "Dettmers et al. 2023, arXiv 2305.14314."};
  t.notes = {
      held_here,
      "Quantization constants are neither parameters nor buffers, so that the footprint of NF4 is "
      "the same with and without double quantization, and below what is in memory.",
      fmt::format(
          "{} is the number of blocks of 64 weights, hence the bytes of their 8-bit scales, "
          "and {} the bytes of this LoRA in fp32: a total of 5.70 GB alone does not tell "
          "which of the two was counted.",
          commas(w.linear / 64), commas(4 * parameters)),
      "The fp32 row computes in fp32 too (quant.compute_dtype), which is what keeps embeddings and "
      "head in 32 bits. Of int8 qlab knows the bytes alone, a byte a weight and an fp32 scale a "
      "row, and refuses to "
      "run on it: its column of measured runs stays empty.",
      "With dropout, and on a base that is not folded with its adapters, a copy of the LoRA in the "
      "compute dtype stands beside the fp32 weights. Gradients and moments are counted apart; qlab "
      "memory shows them."};
  t.sizes = {{"fp32", total(t.rows[0].by_rule)},
             {"int8", total(t.rows[2].by_rule)},
             {"NF4 + double quantization", total(t.rows[4].by_rule)},
             {"LoRA r=32 alone", 4 * parameters}};
  return t;
}

MemoryTable llama2_7b_table(RowMaker& make) {
  const std::string model = "synthetic:llama-2-7b";
  const Weights w(model);
  MemoryTable t;
  t.title = "Llama-2-7B: its weights, and the share that is trained";
  const auto add = [&](const Sets& sets, MemoryRow row) {
    t.rows.push_back(make.row(model, sets, counted::base, std::move(row)));
  };
  add({"quant.type=fp32", "quant.compute_dtype=fp32"},
      {.what = "fp32",
       .published = printed("28 GB", Unit::GB),
       .rule = "4 B for each of 7*10^9 parameters",
       .by_rule = joined(by_weight(w, 4, 4), {{"7*10^9 rounds up", 4 * (7e9 - w.all)}})});
  add({"quant.type=fp32", "quant.compute_dtype=fp32"}, {.what = "fp32, by its shapes",
                                                        .published = printed("26.95 GB", Unit::GB),
                                                        .rule = "4 B a parameter",
                                                        .by_rule = by_weight(w, 4, 4)});
  const std::string four = "about 4 GB";
  add({}, {.what = "NF4: footprint",
           .published = printed(four, Unit::GB),
           .rule = "0.5 B a weight of the linear layers, 2 B of all others",
           .by_rule = by_weight(w, 0.5, 2)});
  add({}, {.what = "NF4: with double-quantized constants",
           .published = printed(four, Unit::GB),
           .rule = "and 1 B for 64 weights, an fp32 scale for 256 of those",
           .by_rule = nf4_by_rule(w, true, 2)});
  add({"quant.double_quant=false"}, {.what = "NF4: with fp32 constants",
                                     .published = printed(four, Unit::GB),
                                     .rule = "and an fp32 scale for 64 weights",
                                     .by_rule = nf4_by_rule(w, false, 2)});
  add({}, {.what = "NF4: footprint, the rest cast to fp32",
           .unit = Unit::GiB,
           .published = printed(four, Unit::GiB),
           .rule = "0.5 B a weight of the linear layers, 4 B of all others",
           .by_rule = by_weight(w, 0.5, 4)});
  const auto trained = [&](const Sets& sets) {
    const auto n = static_cast<double>(make.prediction(model, sets).trainable_params);
    return std::vector<Share>{{"trained of all parameters", 100 * n / (w.all + n)}};
  };
  const auto share_row = [&](int64_t r, const std::string& targets, const std::string& what) {
    const double n = w.lora(r, targets);
    const Sets sets =
        with({fmt::format("lora.r={}", r), "lora.targets=" + targets}, one_sequence(512));
    t.rows.push_back({.what = what,
                      .unit = Unit::percent,
                      .published = printed("0.15 %", Unit::percent),
                      .rule = "trained of all parameters",
                      .by_rule = {{"trained of all parameters", 100 * n / (w.all + n)}},
                      .setting = arguments(model, sets),
                      .ours = trained(sets)});
  };
  share_row(4, "all-linear", "LoRA r=4 on all linear layers");
  share_row(10, "attention", "LoRA r=10 on q, k, v, o");
  share_row(10, "qv", "LoRA r=10 on q, v, packed weights counted as bytes");
  const double n = w.lora(10, "qv"), of_all = 100 * n / (w.all + n);
  MemoryRow& packed = t.rows.back();
  packed.rule = "as scripts that take a packed byte for one weight count";
  packed.by_rule.push_back(
      {"packed bytes taken for weights", 100 * n / (w.all - w.linear / 2 + n) - of_all});
  t.sources = {
      "Published: 28 GB and about 4 GB for the model in fp32 and in 4 bits, and 0.15 % trained: "
      "figures in circulation, without a statement of what they count. 26.95 GB is the fp32 "
      "footprint by Transformers' rule."};
  t.notes = {
      held_here,
      "About 4 GB has these readings, and a rounded figure cannot tell them apart: the "
      "footprint, what the weights take with their constants, and in GiB the footprint after "
      "PEFT's prepare_model_for_kbit_training, which casts what is not quantized to fp32.",
      "0.15 % is the share of none of the usual ranks, 8 and 16; these settings come near."};
  return t;
}

MemoryTable full_finetune_table(RowMaker& make) {
  const std::string model = "synthetic:llama-2-7b";
  const Weights w(model);
  const Sets lora = with({"lora.r=16", "lora.targets=all-linear"}, one_sequence(512));
  MemoryTable t;
  t.title = "Full fine-tuning of 7B with Adam, and LoRA on the same base";
  const std::string up = "7*10^9 rounds up";
  t.rows.push_back(make.row(
      model, with({"quant.type=bf16"}, lora), counted::outside_steps,
      {.what = "16 B a parameter (ours: LoRA on bf16)",
       .published = printed("112 GB", Unit::GB),
       .rule = "7*10^9 parameters: 2 B weight, 2 B gradient, 12 B Adam (fp32 weight, two moments)",
       .by_rule = joined(by_weight(w, 2, 2), {{share::gradients, 2 * w.all},
                                              {share::optimizer, 12 * w.all},
                                              {up, 16 * (7e9 - w.all)}})}));
  t.rows.push_back(make.row(
      model, with({"quant.type=fp32", "quant.compute_dtype=fp32"}, lora), counted::everything,
      {.what = "4 + 20 B a parameter (ours: LoRA on fp32)",
       .published = unread("24 B a parameter"),
       .rule = "7*10^9 parameters: 4 B weight, 4 B gradient, 8 B Adam's moments, 8 B activations "
               "and temporary memory",
       .by_rule = joined(by_weight(w, 4, 4), {{share::gradients, 4 * w.all},
                                              {share::optimizer, 8 * w.all},
                                              {share::activations, 8 * w.all},
                                              {up, 24 * (7e9 - w.all)}})}));
  t.rows.push_back(make.row(model, lora, counted::outside_steps,
                            {.what = "16 B a parameter (ours: LoRA on NF4)",
                             .published = printed("112 GB", Unit::GB),
                             .rule = "as in the first row",
                             .by_rule = t.rows.front().by_rule}));
  t.sources = {
      "16 B: mixed-precision training with Adam, Rajbhandari et al. 2019 (ZeRO), arXiv 1910.02054, "
      "section 3.1.",
      "24 B: 4 B for the weights and 20 B for training them, with 8 B of activations and temporary "
      "memory assumed; an account of courses and tutorials, in the bytes a parameter of "
      "Transformers' documentation on the anatomy of training."};
  t.notes = {
      "qlab trains adapters and never the base, so ours is not the same run: it is what stands in "
      "the place of full fine-tuning, and the difference is what that saves.",
      fmt::format("The model has {} parameters; at 16 B they take {} GB, at 24 B {} GB.",
                  commas(w.all), fmt::format("{:.1f}", 16 * w.all / 1e9),
                  fmt::format("{:.1f}", 24 * w.all / 1e9)),
      "Ours is LoRA r=16 on all linear layers, 1 x 512 tokens. The rows of 16 B leave out "
      "activations "
      "on both sides."};
  return t;
}

MemoryTable qlora_7b_table(RowMaker& make) {
  const std::string model = "synthetic:llama-2-7b";
  const Weights w(model);
  constexpr double trained = 20'300'000;  // 0.29 % of 7*10^9
  const std::vector<Share> rule = joined(
      by_weight(w, 0.5, 0.5),
      {{"7*10^9 rounds up", 0.5 * (7e9 - w.all)}, {"14 B a trained parameter", 14 * trained}});
  MemoryTable t;
  t.title = "QLoRA of 7B";
  const auto settings = [](int64_t length, const std::string& recompute) {
    return with({"lora.r=8", "lora.targets=all-linear", "train.recompute=" + recompute},
                one_sequence(length));
  };
  const auto add = [&](int64_t length, const std::string& recompute, const Counted& counted,
                       const std::string& what, const std::string& published) {
    const Sets sets = with({"lora.r=8", "lora.targets=all-linear", "train.recompute=" + recompute},
                           one_sequence(length));
    t.rows.push_back(
        make.row(model, sets, counted,
                 {.what = what,
                  .published = printed(published, Unit::GB),
                  .rule = "0.5 B for each of 7*10^9 weights, 14 B for each of the 0.29 "
                          "% trained; no term for activations",
                  .by_rule = rule}));
  };
  add(512, "none", counted::outside_steps, "before activations", "about 4.5 GB");
  add(512, "none", counted::everything, "1 x 512 tokens", "7 GB");
  add(1024, "none", counted::everything, "1 x 1024 tokens", "10 GB");
  add(512, "full", counted::everything, "1 x 512 tokens, layers recomputed", "");
  add(1024, "full", counted::everything, "1 x 1024 tokens, layers recomputed", "");
  t.rows.push_back({.what = "in all, setting not stated", .published = printed("24 GB", Unit::GB)});
  t.sources = {
      "Published: a rule of 0.5 B a weight and 14 B a trained parameter, 0.29 % of them, with "
      "about "
      "4.5 GB before activations, 7 GB at sequence 512 and 10 GB at 1024 with batch 1, and 24 GB "
      "in "
      "all in one report: figures in circulation, without a statement of what else they count."};
  const double r8 = w.lora(8, "all-linear");
  t.notes = {
      fmt::format("The rule gives {:.2f} GB where its text says about 4.5: embeddings, head, "
                  "constants and a context may stand for the rest, but it does not say so.",
                  total(rule) / 1e9),
      fmt::format("0.29 % of 7*10^9 is {} parameters; ours is LoRA r=8 on all linear layers, {} "
                  "({:.2f} % of the model's).",
                  commas(trained), commas(r8), 100 * r8 / w.all),
      fmt::format("A trained parameter of ours takes {:.0f} B: weight, gradient and two moments in "
                  "fp32. Context and libraries of the GPU are counted on neither side.",
                  total(make.shares(model, settings(512, "none"), counted::trained)) / r8)};
  return t;
}

}  // namespace qlab
