// Tables of the QLoRA paper: Figure 6 and the memory figures of section 3.
#include <fmt/format.h>

#include <cmath>

#include "experiments/memory_table_rows.h"

namespace qlab {
namespace {

using Sets = std::vector<std::string>;

const std::string no_figure = "not in text";
const std::string paper = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314";
const std::string rule_of_base =
    "section 3: 0.5 B a weight of the linear layers, 1 B for 64, an fp32 scale for 256 of those; 2 "
    "B "
    "of all others";
const Sets lora64 = {"lora.r=64", "lora.targets=all-linear", "train.recompute=full",
                     "train.batch_size=1", "data.seq_len=512"};

struct Figure6 {
  const char *name, *size, *model, *adapters, *optimizer, *total;
};
constexpr Figure6 figure6[] = {
    {"synthetic:llama-7b", "7B", "5,046 MB", "288 MB", "1,152 MB", "6.9 GB"},
    {"synthetic:llama-13b", "13B", "8,476 MB", "450 MB", "1,800 MB", "11.3 GB"},
    {"synthetic:llama-33b", "33B", "19,302 MB", "877.5 MB", "3,510 MB", "24.7 GB"},
    {"synthetic:llama-65b", "65B", "37,074 MB", "1,440 MB", "5,760 MB", "45.0 GB"}};

/// Parameters of r=64 as the figure's adapters count them: four square matrices of attention and a
/// feed-forward of two matrices d x 4d, 2 d r each and 5 d r each.
double ungated(const LlamaConfig& c) {
  return 18.0 * 64 * static_cast<double>(c.hidden_size * c.num_hidden_layers);
}

/// The bars that are legible, and what they leave of the total.
std::vector<Share> bars(const Figure6& f) {
  std::vector<Share> parts = {{"the model's bar", *printed(f.model, Unit::MiB).amount},
                              {share::lora, *printed(f.adapters, Unit::MiB).amount},
                              {share::optimizer, *printed(f.optimizer, Unit::MiB).amount}};
  const double rest = *printed(f.total, Unit::GiB).amount - total(parts);
  parts.push_back({"both gradients, by subtraction", rest});
  return parts;
}

void add_figure6(MemoryTable& t, RowMaker& make, const Figure6& f) {
  const Weights w(f.name);
  const double n = ungated(w.config);
  const std::string of = std::string(f.size) + ": ";
  const auto add = [&](const Counted& counted, MemoryRow row) {
    row = make.row(f.name, lora64, counted, std::move(row));
    row.ours = against_rule(std::move(row.ours), n);
    t.rows.push_back(std::move(row));
  };
  const std::vector<Share> base = nf4_by_rule(w, true, 2);
  add(counted::base, {.what = of + "model",
                      .unit = Unit::MiB,
                      .published = printed(f.model, Unit::MiB),
                      .rule = rule_of_base,
                      .by_rule = base});
  add(counted::adapters, {.what = of + "adapters",
                          .unit = Unit::MiB,
                          .published = printed(f.adapters, Unit::MiB),
                          .rule = "18 d r L parameters of 2 B, r=64",
                          .by_rule = {{share::lora, 2 * n}}});
  add({Category::optimizer}, {.what = of + "optimizer",
                              .unit = Unit::MiB,
                              .published = printed(f.optimizer, Unit::MiB),
                              .rule = "18 d r L parameters, two fp32 moments",
                              .by_rule = {{share::optimizer, 8 * n}}});
  add({Category::gradients},
      {.what = of + "weight gradients", .unit = Unit::MiB, .published = unread(no_figure)});
  add(counted::inside_steps, {.what = of + "input gradients (ours: activations, workspace)",
                              .unit = Unit::MiB,
                              .published = unread(no_figure)});
  add(counted::everything,
      {.what = of + "total",
       .unit = Unit::GiB,
       .published = printed(f.total, Unit::GiB),
       .rule = "the three rules above; gradients have none",
       .by_rule = joined(base, {{share::lora, 2 * n}, {share::optimizer, 8 * n}}),
       .bars = bars(f)});
}

std::vector<Share> per_weight(const std::vector<Share>& bytes, double weights) {
  std::vector<Share> bits;
  for (const Share& s : bytes)
    if (s.name == share::linear || s.name.find("scales") != std::string::npos)
      bits.push_back({s.name, s.amount * 8 / weights});
  return bits;
}

}  // namespace

MemoryTable qlora_fig6_table(RowMaker& make) {
  MemoryTable t;
  t.title = "QLoRA, Figure 6: LLaMA in training, batch 1, sequence 512";
  for (const Figure6& f : figure6) add_figure6(t, make, f);
  t.sources = {paper +
               ", Figure 6 and appendix G: batch 1, sequence 512, gradient checkpointing, "
               "attention left out, by estimate."};
  std::string rests;
  for (const MemoryRow& row : t.rows)
    if (!row.bars.empty())
      rests += (rests.empty() ? "" : ", ") + amount_text(row.bars.back().amount, Unit::GiB);
  t.notes = {
      "Of the bars of weight and of input gradients no figure was found as text. What the other "
      "three leave of the totals is " +
          rests + ".",
      "The figure prints MB and GB. Its adapters and optimizer bars follow their rule exactly in "
      "MiB (2^20), so all bars are read in MiB and the totals in GiB (2^30).",
      "18 d r L counts four square matrices of attention and a feed-forward of two matrices d x "
      "4d. "
      "LLaMA's feed-forward is gated: three matrices, of another width, which makes more adapter "
      "parameters.",
      "The optimizer bar is four times the adapter bar: 8 B a parameter, without an fp32 copy of "
      "the "
      "adapters.",
      "The model bar is above what section 3 gives for the weights, even with embeddings and head "
      "in "
      "fp32 (--table qlora-section3): the paper does not say what else it counts.",
      "Ours holds the adapters and their gradients in fp32, and computes attention too. Layers are "
      "recomputed. Context and libraries of the GPU are not counted."};
  return t;
}

MemoryTable qlora_section3_table(RowMaker& make) {
  const std::string model = "synthetic:llama-7b", large = "synthetic:llama-65b";
  const Weights w(model);
  const Sets r13 = {"lora.r=13", "lora.targets=attention", "train.batch_size=1",
                    "data.seq_len=512"};
  Sets recomputed = r13;
  recomputed.emplace_back("train.recompute=full");
  const Sets no_dq = {"quant.double_quant=false"};
  MemoryTable t;
  t.title = "QLoRA, section 3: memory of LLaMA in training";
  const double of_weights = std::round(0.002 * w.all);
  MemoryRow lora = make.row(model, r13, counted::adapters,
                            {.what = "7B: LoRA weights",
                             .unit = Unit::MiB,
                             .published = printed("26 MB", Unit::MiB),
                             .rule = "0.2 % of the model's weights, 2 B each",
                             .by_rule = {{share::lora, 2 * of_weights}}});
  lora.ours = against_rule(std::move(lora.ours), of_weights);
  t.rows.push_back(std::move(lora));
  t.rows.push_back(make.row(model, r13, counted::inside_steps,
                            {.what = "7B: input gradients (ours: activations, workspace)",
                             .unit = Unit::MiB,
                             .published = printed("567 MB", Unit::MiB)}));
  const double layers = static_cast<double>(w.config.num_hidden_layers);
  t.rows.push_back(make.row(model, recomputed, counted::inside_steps,
                            {.what = "7B: the same with gradient checkpointing",
                             .unit = Unit::MiB,
                             .published = printed("18 MB", Unit::MiB),
                             .rule = "one layer's part of 567 MB",
                             .by_rule = {{"one layer's input gradients",
                                          *printed("567 MB", Unit::MiB).amount / layers}}}));
  const Printed model_bytes = printed("5,048 MB", Unit::MiB);
  t.rows.push_back(make.row(model, {}, counted::base,
                            {.what = "7B: 4-bit base",
                             .unit = Unit::MiB,
                             .published = model_bytes,
                             .rule = rule_of_base,
                             .by_rule = nf4_by_rule(w, true, 2)}));
  t.rows.push_back(make.row(model, {}, counted::base,
                            {.what = "7B: the same, all others read as fp32",
                             .unit = Unit::MiB,
                             .published = model_bytes,
                             .rule = "the same with 4 B of all others",
                             .by_rule = nf4_by_rule(w, true, 4)}));
  t.rows.push_back(make.row(model, no_dq, counted::base,
                            {.what = "7B: the same, and fp32 constants",
                             .unit = Unit::MiB,
                             .published = model_bytes,
                             .rule = "the same with an fp32 scale for 64 weights",
                             .by_rule = nf4_by_rule(w, false, 4)}));
  const auto bits = [&](const std::string& what, const Sets& sets, const Printed& published,
                        const std::string& rule, bool double_quant) {
    t.rows.push_back({.what = what,
                      .unit = Unit::bits,
                      .published = published,
                      .rule = rule,
                      .by_rule = per_weight(nf4_by_rule(w, double_quant, 2), w.linear),
                      .setting = arguments(model, sets),
                      .ours = per_weight(make.shares(model, sets, counted::base), w.linear)});
  };
  bits("7B: bits a weight, NF4", no_dq, {"4 + 0.5 bits", 4.5, 0.05}, "4 + 32/64", false);
  bits("7B: bits a weight, NF4 + double quantization", {}, {"4 + 0.127 bits", 4.127, 0.0005},
       "4 + 8/64 + 32/(64*256)", true);
  const double of_65b = 65e9 / 8;
  std::optional<MeasuredBytes> saved = make.measured(large, no_dq, counted::base);
  const auto nested = make.measured(large, {}, counted::base);
  if (saved && nested) {
    saved->bytes -= nested->bytes;
    if (saved->commit != nested->commit) saved->commit += " and " + nested->commit;
  }
  t.rows.push_back(
      {.what = "65B: saved by double quantization",
       .published = printed("about 3 GB", Unit::GB),
       .rule = "0.373 bits for each of 65*10^9 weights",
       .by_rule = {{share::scales32, std::round(of_65b * (32.0 / 64 - 32.0 / (64 * 256)))},
                   {share::scales8, std::round(-of_65b * 8 / 64)}},
       .setting = arguments(large, no_dq) + ", less " + large,
       .ours =
           less(make.shares(large, no_dq, counted::base), make.shares(large, {}, counted::base)),
       .measured = nested ? saved : std::nullopt});
  t.rows.push_back(
      {.what = "65B: full fine-tuning in 16 bits",
       .published = printed("> 780 GB", Unit::GB),
       .rule = "fits 12 B for each of 65*10^9 weights",
       .by_rule = {
           {"weights", 2 * 65e9}, {share::gradients, 2 * 65e9}, {share::optimizer, 8 * 65e9}}});
  t.rows.push_back(make.row(large, lora64, counted::everything,
                            {.what = "65B: QLoRA, r=64 on all linear layers",
                             .published = printed("< 48 GB", Unit::GB)}));
  t.sources = {paper +
               ", section 3 (LLaMA-7B on FLAN v2, batch 1; block-wise and double "
               "quantization) and its introduction (65B)."};
  t.notes = {
      "MB of the paper is read as MiB, in which 0.2 % of the weights are 26.",
      "0.2 % of the weights is no whole rank; r=13 on q, k, v, o comes nearest. The paper does not "
      "state the sequence length of these figures; ours is 512, with nothing recomputed and with "
      "every layer recomputed.",
      "Input gradients are what the paper counts of a step; ours is everything that a step holds, "
      "attention, loss and expanded weights with it, at the moment of the peak.",
      "567 / 32 layers is 17.7: the 18 MB are one layer's.",
      "None of these readings of the storage gives 5,048 MB: the paper does not say what else it "
      "counts.",
      "780 GB is 12 B a weight: 16-bit weights and gradients and two fp32 moments, without the "
      "fp32 "
      "copy of the weights that the account of --table full-finetune has.",
      "A bound has no difference. 48 GB is a GPU's memory, 48 GiB or 51.5*10^9 bytes; context and "
      "libraries of the GPU are not counted in ours."};
  return t;
}

}  // namespace qlab
