#include "experiments/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "core/error.h"
#include "core/memory.h"

namespace qlab {
namespace {

using testing::HasSubstr;
using testing::MatchesRegex;

Config parse(const std::string& text) {
  Config config = parse_config(YAML::Load(text), "run.yaml");
  resolve(config);
  return config;
}

std::string error_of(const std::string& text) {
  try {
    parse(text);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

std::string set_error(const std::vector<std::string>& sets) {
  try {
    load_config("", sets);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Config, Defaults) {
  const Config c = load_config("", {});
  EXPECT_EQ(c.quant.type, "nf4");
  EXPECT_EQ(c.quant.block_size, 64);
  EXPECT_TRUE(c.quant.double_quant);
  EXPECT_FALSE(c.lora.present);
  EXPECT_EQ(c.lora.r, 16);
  EXPECT_EQ(c.lora.alpha, 32);
  EXPECT_EQ(c.lora.targets.str(), "all-linear");
  EXPECT_EQ(c.optim.lr, 2e-4);
  EXPECT_EQ(c.optim.betas, (std::array{0.9, 0.999}));
  EXPECT_EQ(c.optim.warmup_ratio, 0.03);
  EXPECT_FALSE(c.optim.warmup_steps);
  EXPECT_EQ(c.optim.schedule, "cosine");
  EXPECT_EQ(c.train.epochs, 1);
  EXPECT_FALSE(c.train.steps);
  EXPECT_EQ(c.train.dropout_seed, 0);
}

TEST(Config, ReadsBlocksAndDottedKeys) {
  const Config c = parse(R"(
model: {path: "synthetic:tiny"}
quant.type: bf16
lora: {r: 8, targets: [q_proj, v_proj], dropout: 0.05}
train: {steps: 1e3, seed: 7, init_seed: 3}
optim: {lr: 1e-4, betas: [0.8, 0.95], warmup_steps: 5}
)");
  EXPECT_EQ(c.model.path, "synthetic:tiny");
  EXPECT_EQ(c.quant.type, "bf16");
  EXPECT_TRUE(c.lora.present);
  EXPECT_EQ(c.lora.alpha, 16);
  EXPECT_EQ(c.lora.targets.names, (std::vector<std::string>{"q_proj", "v_proj"}));
  EXPECT_EQ(c.lora.targets.pattern, "");
  EXPECT_EQ(c.train.steps, 1000);
  EXPECT_FALSE(c.train.epochs);
  EXPECT_EQ(c.train.init_seed, 3);
  EXPECT_EQ(c.train.data_seed, 7);
  EXPECT_EQ(c.optim.betas, (std::array{0.8, 0.95}));
  EXPECT_EQ(c.optim.warmup_steps, 5);
  EXPECT_FALSE(c.optim.warmup_ratio);
}

TEST(Config, AnEmptyLoraBlockCounts) {
  EXPECT_TRUE(parse("lora:").lora.present);
  EXPECT_TRUE(parse("lora: {}").lora.present);
  EXPECT_TRUE(parse("lora_alpha: 4").lora.present);
  EXPECT_FALSE(parse("train: {steps: 1}").lora.present);
}

TEST(Config, AliasesOfPeftTransformersAndTrl) {
  const Config c = parse(R"(
model_name_or_path: synthetic:tiny
load_in_4bit: true
bnb_4bit_quant_type: nf4
bnb_4bit_use_double_quant: False
bnb_4bit_compute_dtype: torch.bfloat16
load_in_8bit: false
lora: {r: 4, lora_alpha: 8, target_modules: ALL-LINEAR, use_rslora: true}
lora_dropout: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
gradient_checkpointing: true
max_length: 128
max_steps: -1
num_train_epochs: 2
learning_rate: 1e-5
lr_scheduler_type: constant_with_warmup
optim: adamw_torch
adam_beta1: 0.85
adam_epsilon: 1e-6
data_seed: 9
)");
  EXPECT_EQ(c.quant.type, "nf4");
  EXPECT_FALSE(c.quant.double_quant);
  EXPECT_EQ(c.quant.compute_dtype, "bf16");
  EXPECT_EQ(parse("bnb_4bit_compute_dtype: torch.float16").quant.compute_dtype, "fp16");
  EXPECT_EQ(c.lora.alpha, 8);
  EXPECT_EQ(c.lora.scale(), 4);
  EXPECT_EQ(c.lora.targets.pattern, "all-linear");
  EXPECT_EQ(c.lora.dropout, 0.1);
  EXPECT_EQ(c.train.batch_size, 2);
  EXPECT_EQ(c.train.grad_accum, 3);
  EXPECT_EQ(c.train.recompute, "full");
  EXPECT_EQ(c.data.seq_len, 128);
  EXPECT_EQ(c.data.eval_seq_len, 512);
  EXPECT_EQ(c.train.epochs, 2);
  EXPECT_EQ(c.optim.schedule, "constant");
  EXPECT_EQ(c.optim.betas, (std::array{0.85, 0.999}));
  EXPECT_EQ(c.optim.eps, 1e-6);
  EXPECT_EQ(c.train.data_seed, 9);
}

TEST(Config, Int8HasBytesAndNothingElse) {
  EXPECT_EQ(parse("load_in_8bit: true").quant.type, "int8");
  EXPECT_THAT(error_of("load_in_8bit: true\nload_in_4bit: true"), HasSubstr("contradicts"));
  const Config c = parse("model.path: x\ndata.train: synthetic\nlora.r: 4\nquant.type: int8\n");
  try {
    check_computable(c, "run.yaml");
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(),
                 "run.yaml:4: quant.type: of int8 only the bytes are known, for qlab memory and "
                 "inspect; nothing trains or evaluates with it: set nf4, bf16, fp16 or fp32");
  }
}

TEST(Config, Targets) {
  EXPECT_EQ(parse("lora: {targets: mlp}").lora.targets.pattern, "mlp");
  EXPECT_EQ(parse("lora: {targets: q_proj}").lora.targets.names,
            std::vector<std::string>{"q_proj"});
  const std::string regex = R"(model\.layers\.[0-3]\..*_proj)";
  EXPECT_EQ(load_config("", {"lora.targets=" + regex}).lora.targets.pattern, regex);
  EXPECT_EQ(load_config("", {"lora.targets=[q_proj, o_proj]"}).lora.targets.str(),
            "[q_proj, o_proj]");
  EXPECT_THAT(error_of("lora: {targets: all-linar}"), HasSubstr("did you mean \"all-linear\"?"));
  EXPECT_THAT(error_of("lora: {targets: []}"), HasSubstr("a list of module names"));
}

TEST(Config, UnknownKeysNameLineAndNearest) {
  EXPECT_EQ(error_of("model: {path: x}\ntrain:\n  steps: 3\n  bacth_size: 4\n")
                .substr(0, std::string("run.yaml:4: unknown key \"train.bacth_size\"; did you mean "
                                       "\"train.batch_size\"?")
                               .size()),
            "run.yaml:4: unknown key \"train.bacth_size\"; did you mean \"train.batch_size\"?");
  EXPECT_THAT(error_of("train: {lr: 1}"), HasSubstr("did you mean \"optim.lr\"?"));
  EXPECT_THAT(error_of("learning_rte: 1"), HasSubstr("did you mean \"learning_rate\"?"));
  EXPECT_THAT(error_of("lora: {rank: 8}"),
              AllOf(HasSubstr("did you mean \"lora.r\"?"), HasSubstr("keys of lora: r, alpha")));
  EXPECT_THAT(error_of("trian: {steps: 1}"), HasSubstr("did you mean \"train\"?"));
  EXPECT_THAT(error_of("zzzzzzzz: 1"), HasSubstr("blocks: model, quant"));
  EXPECT_THAT(set_error({"lora.alhpa=8"}), HasSubstr("--set lora.alhpa=8: unknown key"));
}

TEST(Config, KeysOfOtherTools) {
  const std::vector<std::pair<std::string, std::string>> keys{
      {"bits", "quant.type"},
      {"torch_dtype", "quant.compute_dtype"},
      {"dtype", "quant.compute_dtype"},
      {"rslora", "lora.scaling"},
      {"lora_target_modules", "target_modules"},
      {"dataset_name", "data.train"},
      {"train_on_inputs", "data.completion_only"},
      {"model_max_length", "data.seq_len"},
      {"micro_batch_size", "train.batch_size"},
      {"use_gradient_checkpointing", "gradient_checkpointing"},
      {"random_state", "train.seed"},
      {"optimizer", "optim.type"},
      {"beta1", "optim.betas"},
      {"gradient_clipping", "optim.max_grad_norm"},
      {"lr_scheduler", "optim.schedule"},
      {"output_dir", "--out"},
  };
  for (const auto& [name, ours] : keys)
    EXPECT_THAT(error_of(name + ": 1"), HasSubstr("did you mean \"" + ours + "\"?")) << name;
  // What there is one way of; the nearest name would mean something else.
  for (const char* name : {"bias", "lora.bias", "report_to", "per_device_eval_batch_size"})
    EXPECT_THAT(
        error_of(std::string(name) + ": x"),
        AllOf(HasSubstr(std::string(name) + "\"; remove it: "), Not(HasSubstr("did you mean"))));
}

TEST(Config, AllUnknownKeysAreNamedAtOnce) {
  EXPECT_THAT(error_of("lora:\n  r: 8\n  bias: none\n  alhpa: 4\nreport_to: none\n"),
              MatchesRegex("run.yaml:3: unknown key \"lora.bias\"; remove it: [^\n]*\n"
                           "run.yaml:4: unknown key \"lora.alhpa\"; did you mean [^\n]*\n"
                           "run.yaml:5: unknown key \"report_to\"; remove it: [^\n]*"));
}

TEST(Config, WrongTypesNameLineAndValue) {
  EXPECT_EQ(error_of("lora:\n  r: eight"),
            "run.yaml:2: lora.r: expected a whole number, got \"eight\"");
  EXPECT_EQ(error_of("lora: {r: 2.5}"), "run.yaml:1: lora.r: expected a whole number, got \"2.5\"");
  EXPECT_EQ(error_of("lora_alpha: [1]"), "run.yaml:1: lora_alpha: expected a number, got a list");
  EXPECT_EQ(error_of("quant: {double_quant: 1}"),
            "run.yaml:1: quant.double_quant: expected true or false, got \"1\"");
  EXPECT_EQ(
      error_of("quant: {type: fp4}"),
      "run.yaml:1: quant.type: expected one of nf4, bf16, fp16, fp32, int8, got \"fp4\"; fp4 and "
      "other types are not supported");
  EXPECT_EQ(error_of("quant: nf4"), "run.yaml:1: quant is a block of keys, got \"nf4\"");
  EXPECT_EQ(error_of("optim: {lr: }"), "run.yaml:1: optim.lr: expected a number, got nothing");
  EXPECT_THAT(error_of("optim: {betas: 0.9}"), HasSubstr("expected two numbers"));
  EXPECT_THAT(error_of("optim: {lr: .nan}"), HasSubstr("expected a number"));
  EXPECT_THAT(error_of("train: {steps: 1_000}"), HasSubstr("got \"1_000\""));
  EXPECT_EQ(set_error({"lora.r=x"}), "--set lora.r=x: lora.r: expected a whole number, got \"x\"");
  EXPECT_THAT(set_error({"lora.r"}), HasSubstr("expected key=value"));
}

TEST(Config, OutOfRange) {
  EXPECT_EQ(error_of("lora: {r: 0}"),
            "run.yaml:1: lora.r: expected a whole number in [1, 2147483647], got \"0\"");
  EXPECT_EQ(set_error({"lora.r=2147483647"}), "");
  for (const char* rank : {"2147483648", "4611686018427387904", "9223372036854775807"})
    EXPECT_THAT(set_error({fmt::format("lora.r={}", rank)}), HasSubstr("in [1, 2147483647]"));
  EXPECT_THAT(error_of("lora: {dropout: 1}"), HasSubstr("in [0, 1)"));
  EXPECT_THAT(error_of("optim: {lr: 0}"), HasSubstr("above 0"));
  EXPECT_THAT(error_of("quant: {block_size: 100}"), HasSubstr("one of 32, 64"));
  EXPECT_THAT(error_of("train: {seed: -1}"), HasSubstr("at least 0"));
}

TEST(Config, NumbersMustBeFloats) {
  EXPECT_EQ(set_error({"optim.eps=1e-50"}),
            "--set optim.eps=1e-50: optim.eps: expected a number above 0 also as a 32-bit float "
            "(1.2e-38 to 3.4e38, 7 digits), got \"1e-50\"");
  for (const char* set : {"optim.lr=1e-46", "max_grad_norm=1e-320", "optim.lr=1e40",
                          "lora.alpha=1e300", "lora.alpha=1e-50", "adam_beta2=0.9999999999",
                          "optim.betas=[0.9, 0.9999999999]", "lora.dropout=0.9999999999"})
    EXPECT_THAT(set_error({set}), HasSubstr("32-bit float")) << set;
  for (const char* set : {"optim.lr=1.2e-38", "max_grad_norm=0", "optim.weight_decay=3e38",
                          "adam_beta2=0.9999999", "optim.betas=[0, 0]"})
    EXPECT_EQ(set_error({set}), "") << set;
}

TEST(Config, Contradictions) {
  EXPECT_THAT(error_of("train:\n  steps: 10\n  epochs: 2\n"),
              HasSubstr("run.yaml:3: train.epochs excludes train.steps (run.yaml:2)"));
  EXPECT_THAT(error_of("optim: {warmup_steps: 1, warmup_ratio: 0.1}"), HasSubstr("excludes"));
  EXPECT_THAT(error_of("lora: {alpha: 8}\nlora_alpha: 16\n"),
              HasSubstr("run.yaml:2: lora_alpha contradicts lora.alpha (run.yaml:1)"));
  EXPECT_THAT(error_of("lora:\n  r: 8\n  r: 8\n"),
              HasSubstr("run.yaml:3: \"r\" stands twice, first at run.yaml:2"));
  EXPECT_EQ(error_of("lora: {alpha: 8}\nlora_alpha: 8.0\n"), "");
  EXPECT_EQ(set_error({"lora.r=8", "lora.r=4"}),
            "--set lora.r=4: lora.r is given twice, with another value (--set lora.r=8): keep one");
  EXPECT_THAT(set_error({"lora.r=8", "lora_r=4"}), HasSubstr("lora_r contradicts lora.r"));
}

TEST(Config, OptionsReplaceWhatTheFileSays) {
  Config c = parse_config(YAML::Load("train: {epochs: 3}\noptim: {warmup_ratio: 0.1}"), "run.yaml");
  apply_sets(c, {"train.steps=20", "warmup_steps=2", "lora.r=4", "quant={type: fp32}"});
  resolve(c);
  EXPECT_EQ(c.train.steps, 20);
  EXPECT_FALSE(c.train.epochs);
  EXPECT_EQ(c.optim.warmup_steps, 2);
  EXPECT_FALSE(c.optim.warmup_ratio);
  EXPECT_EQ(c.lora.alpha, 8);
  EXPECT_EQ(c.quant.type, "fp32");
}

TEST(Config, OptionsAreYaml) {
  EXPECT_EQ(load_config("", {"quant.type=\"bf16\""}).quant.type, "bf16");
  EXPECT_EQ(load_config("", {"model.path='models/a: b'"}).model.path, "models/a: b");
  EXPECT_EQ(load_config("", {"model.path=synthetic:tiny"}).model.path, "synthetic:tiny");
  EXPECT_EQ(load_config("", {"lora.adapter=7"}).lora.adapter, "7");
  for (const char* nothing : {"data.eval=null", "data.eval=~", "data.eval=", "data.eval=\"\""}) {
    Config c = parse_config(YAML::Load("data: {eval: some.jsonl}"), "run.yaml");
    apply_sets(c, {nothing});
    EXPECT_EQ(c.data.eval, "") << nothing;
  }
  EXPECT_THAT(set_error({"quant.type=null"}), HasSubstr("got nothing"));
  EXPECT_THAT(set_error({"data.eval=[a]"}), HasSubstr("expected text, got a list"));
}

TEST(Config, SweepFilesAreRefused) {
  EXPECT_THAT(error_of("base: x.yaml\nparameters: {}"), HasSubstr("use qlab sweep run.yaml"));
}

TEST(Config, ResolvedYamlReadsBackEqual) {
  const Config c = parse(R"(
model: {path: "models/a: b #1.gguf"}
lora: {r: 8, targets: '.*\.q_proj', scaling: alpha/sqrt(r), adapter: "7"}
data: {train: synthetic, eval: "true"}
train: {steps: 12, seed: 3}
optim: {lr: 3.14159265358979e-7, betas: [0.91, 0.98]}
)");
  const std::string text = to_yaml(c);
  const Config again = parse(text);
  EXPECT_EQ(to_yaml(again), text);
  EXPECT_EQ(canonical(again), canonical(c));
  EXPECT_EQ(again.optim.lr, c.optim.lr);
  EXPECT_EQ(again.model.path, c.model.path);
  EXPECT_EQ(again.lora.targets, c.lora.targets);
  EXPECT_EQ(to_yaml(parse(to_yaml(parse("")))), to_yaml(parse("")));
}

TEST(Config, CanonicalTextSeesNumbersNotSpelling) {
  const std::string base = canonical(parse("lora: {r: 8}\noptim: {lr: 2e-4}"));
  EXPECT_EQ(base, canonical(parse("lora: {r: 8, alpha: 16.0}\nlearning_rate: 0.0002")));
  EXPECT_EQ(base, canonical(parse("lora: {r: 8}\ntrain: {recompute: full, log_every: 5}")));
  EXPECT_EQ(base, canonical(parse("lora: {r: 8}\ntrain: {dropout_seed: 5}")));
  EXPECT_NE(base, canonical(parse("lora: {r: 8, alpha: 8}")));
  EXPECT_NE(base, canonical(parse("lora: {r: 8}\ntrain: {data_seed: 5}")));
  EXPECT_EQ(canonical(parse("quant: {type: bf16}")),
            canonical(parse("quant: {type: bf16, block_size: 128}")));
  EXPECT_EQ(canonical(parse("lora: {targets: [q_proj, v_proj]}")),
            canonical(parse("lora: {targets: [v_proj, q_proj]}")));
}

TEST(Config, OptimizersHaveOtherNames) {
  for (const auto& [name, own] :
       std::map<std::string, std::string>{{"adamw_torch", "adamw"},
                                          {"adamw_8bit", "adamw8bit"},
                                          {"adamw_bnb_8bit", "adamw8bit"},
                                          {"paged_adamw_32bit", "paged_adamw"},
                                          {"paged_adamw_8bit", "paged_adamw8bit"},
                                          {"paged_adamw", "paged_adamw"}}) {
    EXPECT_EQ(parse("optim: " + name).optim.type, own);
    EXPECT_EQ(parse("optim: {type: " + name + "}").optim.type, own);
  }
  // Where states wait is no part of a trial's identity; how they are kept is.
  EXPECT_EQ(canonical(parse("optim: adamw")), canonical(parse("optim: paged_adamw")));
  EXPECT_EQ(canonical(parse("optim: adamw8bit")), canonical(parse("optim: paged_adamw8bit")));
  EXPECT_NE(canonical(parse("optim: adamw")), canonical(parse("optim: adamw8bit")));
}

TEST(Config, KeysAsText) {
  const Config c = parse("lora: {r: 8}");
  EXPECT_EQ(get_key(c, "lora_alpha"), "16");
  EXPECT_EQ(get_key(c, "optim.lr"), "0.0002");
  EXPECT_EQ(get_key(c, "optim.betas"), "[0.9, 0.999]");
  EXPECT_EQ(get_key(c, "train.steps"), "");
  EXPECT_EQ(canonical_key("learning_rate", "x"), "optim.lr");
  EXPECT_THROW(canonical_key("lora.q", "x"), Error);
  EXPECT_TRUE(changes_numbers("lora.r"));
  EXPECT_FALSE(changes_numbers("train.recompute"));
}

TEST(Config, WhatTrainingNeeds) {
  const auto missing = [](const std::string& text) -> std::string {
    try {
      check_trainable(parse(text), "run.yaml");
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(missing("lora: {r: 8}"), HasSubstr("model.path is missing"));
  EXPECT_THAT(missing("lora:\nmodel: {path: x}"), HasSubstr("data.train is missing"));
  EXPECT_THAT(missing("model: {path: x}\ndata: {train: synthetic}"), HasSubstr("no lora block"));
  EXPECT_EQ(missing("model: {path: x}\ndata: {train: synthetic}\nlora:"), "");
}

TEST(Config, FilesAndPathsBesideThem) {
  const auto dir = std::filesystem::path(testing::TempDir()) / "config_files";
  std::filesystem::create_directories(dir);
  const std::string file = (dir / "run.yaml").string();
  std::ofstream(dir / "there.jsonl") << "{}\n";
  std::ofstream(file) << "model: {path: org/name}\ndata: {train: there.jsonl, eval: gone.jsonl}\n";
  const Config c = load_config(file, {});
  EXPECT_EQ(c.data.train, (dir / "there.jsonl").string());
  EXPECT_EQ(c.data.eval, "gone.jsonl");
  EXPECT_EQ(c.model.path, "org/name");

  const auto error = [&](const std::string& path) -> std::string {
    try {
      load_config(path, {});
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(error((dir / "absent.yaml").string()), HasSubstr("no such file"));
  EXPECT_THAT(error(dir.string()), HasSubstr("is a directory"));
  std::ofstream(file) << "lora: {r: 8\ntrain: [";
  EXPECT_THAT(error(file), HasSubstr("not valid YAML"));
  std::ofstream(file) << "# a\n\nlora:\n\tr: 8\n";
  EXPECT_THAT(error(file), HasSubstr("run.yaml:4: a tab indents this line"));
  std::ofstream(file) << "lora:\n  r: 8\n \talpha: 8\n";
  EXPECT_THAT(error(file), HasSubstr("run.yaml:3: a tab indents this line"));
  std::ofstream(file) << "lora: [r\n# a\n\t# b\n";  // where a tab does no harm
  EXPECT_THAT(error(file), HasSubstr("run.yaml:4: not valid YAML: end of sequence"));
  for (const char* text : {"lora:\n  r 8\n  alpha: 3\n", "lora:\n  r: 8\n   alpha: 3\n"}) {
    std::ofstream(file) << text;
    EXPECT_THAT(error(file), HasSubstr("run.yaml:3: not valid YAML: no key can stand here"));
  }
  std::ofstream(file) << "lora: {r:\t8}\n";
  EXPECT_EQ(error(file), "");
  std::ofstream(file) << "lora: {r: 8}\n---\ntrain: {steps: 3}\n";
  EXPECT_THAT(error(file), HasSubstr("run.yaml:3: a second document begins"));
  std::ofstream(file) << "---\nlora: {r: 8}\n...\n";
  EXPECT_EQ(error(file), "");
  std::ofstream(file) << "just text";
  EXPECT_THAT(error(file), HasSubstr("expected keys and values"));
  std::ofstream(file) << "";
  EXPECT_THAT(error(file), HasSubstr("empty"));
  std::filesystem::remove_all(dir);
}

TEST(Config, DocumentationHasTheTable) {
  std::ifstream file("docs/configuration.md");
  if (!file) GTEST_SKIP() << "not run from the root of the sources";
  std::stringstream text;
  text << file.rdbuf();
  if (text.str().find(config_markdown()) != std::string::npos) return;
  const std::string table = testing::TempDir() + "configuration_table.md";
  std::ofstream(table) << config_markdown();
  FAIL() << "the tables in docs/configuration.md are not the program's; those are in " << table;
}

TEST(Config, ReadsBytes) {
  EXPECT_EQ(parse_bytes("512"), 512);
  EXPECT_EQ(parse_bytes("14.3GB"), 14300000000);
  EXPECT_EQ(parse_bytes("24 GiB"), int64_t{24} << 30);
  EXPECT_EQ(parse_bytes("1.5kB"), 1500);
  EXPECT_EQ(parse_bytes("24gib"), int64_t{24} << 30);
  EXPECT_EQ(parse_bytes("24GB"), parse_bytes("24gb"));
  EXPECT_EQ(parse_bytes("7b"), 7);
  for (const char* wrong : {"", "GB", "nan", "-1", "5XB", "3G", "1e30GB", "7 GBs"})
    EXPECT_EQ(parse_bytes(wrong), std::nullopt) << wrong;
  EXPECT_EQ(load_config("", {"quant.resident=auto"}).quant.resident.text, "auto");
  for (const char* none : {"0", "0GB", "-0", "0.0"})
    EXPECT_EQ(load_config("", {fmt::format("quant.resident={}", none)}).quant.resident.text, "0");
  EXPECT_THROW(load_config("", {"quant.resident=much"}), Error);
  EXPECT_FALSE(changes_numbers("quant.resident"));
  EXPECT_FALSE(changes_numbers("train.graphs"));
}

}  // namespace
}  // namespace qlab
