// What qlab memory says about rates, limits and settings that no run has.
#include "experiments/cost_model.h"
#include "experiments/forecast.h"
#include "experiments/gpus.h"
#include "tests/support/command.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Matcher;
using testing::Not;
using testing::StartsWith;

class MemoryAnswersTest : public CommandTest {
 protected:
  /// Of `target`, by default with LoRA.
  std::string text(const std::string& target, const Arguments& more) const {
    Arguments arguments = {"memory", target, "--set", "lora.r=4", "--set", "data.train=synthetic"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.out;
  }
  Json json(const std::string& target, Arguments more) const {
    more.emplace_back("--json");
    return Json::parse(text(target, more));
  }
};

TEST_F(MemoryAnswersTest, SaysWhoseRatesItTakes) {
  const std::string tiny = "synthetic:tiny";
  EXPECT_THAT(text(tiny, {"--gpu", "24GiB"}), HasSubstr("at an H100's rates: no card is named"));
  EXPECT_THAT(text(tiny, {"--gpu", "rtx4090"}), HasSubstr("from its datasheet"));
  EXPECT_THAT(text(tiny, {"--gpu", "h100-80gb"}), HasSubstr("from rates measured on this GPU"));
  EXPECT_THAT(text(tiny, {"--device", "cpu"}), HasSubstr("at the rates of an AMD EPYC's cores"));
  Json bytes = json(tiny, {"--gpu", "24GiB"}), l4 = json(tiny, {"--gpu", "l4"}),
       h100 = json(tiny, {"--gpu", "h100-80gb"});
  EXPECT_EQ(bytes["rates"], "h100");
  EXPECT_EQ(l4["rates"], "datasheet");
  EXPECT_EQ(h100["rates"], "measured");
  EXPECT_EQ(bytes["step_seconds"], h100["step_seconds"]);
  EXPECT_GT(l4["step_seconds"], h100["step_seconds"]);
  const MemoryTarget none{Device::cuda(), "a GPU", {}, {}, gpu_rates("")};
  EXPECT_STREQ(rates_origin(none).text, "at an H100's rates: no card is named");
}

TEST_F(MemoryAnswersTest, APlanNamesTheWeightsThatItHoldsExpanded) {
  const Json held = json("synthetic:tiny", {"--gpu", "t4", "--set", "quant.resident=auto", "--set",
                                            "quant.type=nf4", "--set", "train.recompute=none"});
  const auto bytes = held["held_expanded_bytes"].get<int64_t>();
  EXPECT_GT(bytes, 0);
  EXPECT_THAT(std::string(held["plan"]), HasSubstr("; at most " + format_bytes(bytes) + " of"));
}

TEST_F(MemoryAnswersTest, SeveralGpusAreNoLargerOne) {
  for (const char* gpus : {"2x24GiB", "8xh100-80gb", "2X"})
    expect_refused({"memory", "synthetic:tiny", "--gpu", gpus}, {gpus, "one GPU", "--replicas"});
}

TEST_F(MemoryAnswersTest, ATrialOfAFileIsNoGang) {
  const Arguments four = {"--gpu", "24GiB", "--set", "parallel.trials_per_gpu=4"};
  const std::string file = folder_.write("one.yaml", "model: {path: \"synthetic:tiny\"}\n");
  Json alone = json("synthetic:tiny", {"--gpu", "24GiB"});
  EXPECT_EQ(json(file, four)["peak_bytes"], alone["peak_bytes"]);
  EXPECT_GT(json("synthetic:tiny", four)["peak_bytes"], alone["peak_bytes"]);
  EXPECT_THAT(text(file, four), Not(HasSubstr("trials together")));
  EXPECT_THAT(text("synthetic:tiny", four), HasSubstr("4 trials together"));
}

TEST_F(MemoryAnswersTest, WithoutALimitNothingFitsOrDoesNot) {
  const Sweep sweep = load_sweep(
      folder_.write("sweep.yaml",
                    "base: {model: {path: \"synthetic:tiny\"}, lora: {r: 4}, train: {steps: 5}, "
                    "data: {train: synthetic}}\nparameters: {quant.type: {values: [nf4, int8]}}\n"),
      {});
  Library library;
  MemoryTarget target{Device::cuda(), "a GPU", {}, {}, gpu_rates("")};
  const auto table = [&] {
    return forecast_table(sweep, forecast(sweep, library, target), target);
  };
  EXPECT_THAT(table(), AllOf(HasSubstr("peak"), Not(HasSubstr("fits")), Not(HasSubstr("yes"))));
  target.capacity = int64_t{1} << 30;
  const std::vector<TrialForecast> trials = forecast(sweep, library, target);
  ASSERT_EQ(trials.size(), 2u);
  EXPECT_EQ(trials[0].fits, true);
  EXPECT_GT(trials[0].seconds, 0);
  EXPECT_EQ(trials[1].fits, std::nullopt);
  EXPECT_EQ(trials[1].seconds, 0);
  EXPECT_THAT(table(), AllOf(HasSubstr("fits"), HasSubstr("yes"),
                             HasSubstr("bytes alone: no run computes with int8"),
                             HasSubstr("for training steps alone, 1 of 2 trials without a time")));
  EXPECT_THAT(table(), Not(HasSubstr("had all of them room")));
  target.capacity = 1000;
  EXPECT_EQ(forecast(sweep, library, target)[0].fits, false);
  EXPECT_THAT(table(), HasSubstr("had all of them room"));
}

class ForecastTest : public testing::Test {
 protected:
  std::string table(const std::string& more, std::optional<int64_t> capacity = {}) const {
    const Sweep sweep = load_sweep(
        folder_.write("sweep.yaml",
                      "base: {model: {path: \"synthetic:tiny\"}, train: {steps: 5}, data: {train: "
                      "synthetic}" +
                          more),
        {});
    Library library;
    const MemoryTarget target{Device::cuda(), "a GPU", {}, capacity, gpu_rates("")};
    return forecast_table(sweep, forecast(sweep, library, target), target);
  }
  TemporaryFolder folder_;
};

TEST_F(ForecastTest, NamesTheGangsWhereThereAreSome) {
  const std::string swept =
      "}\nparameters: {lora.r: {values: [4, 8]}, train.recompute: {values: [none, full]}}\n";
  const std::string two = ", parallel: {trials_per_gpu: 2}";
  EXPECT_THAT(table(swept), Not(HasSubstr("gang")));
  const std::string together = table(two + swept);
  EXPECT_THAT(together, HasSubstr("seed  gang  peak"));
  EXPECT_THAT(together, testing::ContainsRegex("r4-recompute-none-s0 .* 0     1     .*\n"
                                               "r4-recompute-full-s0 .* 0     2     .*\n"
                                               "r8-recompute-none-s0 .* 0     1     .*\n"
                                               "r8-recompute-full-s0 .* 0     2     "));
  const std::string three = "}\nparameters: {lora.r: {values: [4, 8, 16]}}\n";
  EXPECT_THAT(table(two + three), testing::ContainsRegex("\nr16-s0 .* 0     -     "));
  // Halved until each is alone, as in a run, which says so too.
  EXPECT_THAT(table(two + swept, 1000),
              AllOf(Not(HasSubstr("seed  gang")),
                    HasSubstr("all 4 trials: a gang of 2 does not fit: in halves; nothing else")));
  EXPECT_THAT(table(two + swept, -1000), HasSubstr("with 0 B"));  // less than a context
}

TEST_F(ForecastTest, ANoteNamesItsTrials) {
  const auto seeds = [](const std::string& list) {
    return ", lora: {r: 4}}\nseeds: [" + list +
           "]\nparameters: {quant.type: {values: [nf4, int8]}}";
  };
  const std::string note = ": bytes alone: no run computes with int8";
  EXPECT_THAT(table(seeds("0")), HasSubstr("\nint8-s0" + note));
  EXPECT_THAT(table(seeds("0, 1, 2, 3")), HasSubstr("\nint8-s0, int8-s1, int8-s2, int8-s3" + note));
  EXPECT_THAT(table(seeds("0, 1, 2, 3, 4")),
              HasSubstr("\nint8-s0, int8-s1, int8-s2 and 2 others" + note));
  EXPECT_THAT(table(", lora: {r: 4}, quant: {type: int8}}\nseeds: [0, 1]"),
              HasSubstr("\nall 2 trials" + note));
}

// Random data has 4,096 examples, so that epochs of it are steps.
TEST_F(ForecastTest, RandomDataHasEpochs) {
  const auto time = [&](const std::string& train) {
    const Sweep sweep = load_sweep(folder_.write("run.yaml",
                                                 "model: {path: \"synthetic:tiny\"}\nlora: {r: 4}\n"
                                                 "data: {train: synthetic}\ntrain: " +
                                                     train),
                                   {});
    Library library;
    const MemoryTarget target{Device::cuda(), "a GPU", {}, {}, gpu_rates("")};
    return forecast(sweep, library, target)[0].seconds;
  };
  EXPECT_GT(time("{batch_size: 3}"), 0);
  EXPECT_EQ(time("{batch_size: 3}"), time("{batch_size: 3, steps: 1366}"));
  EXPECT_EQ(time("{batch_size: 4, grad_accum: 2, epochs: 2}"),
            time("{batch_size: 4, grad_accum: 2, steps: 1024}"));
}

// Beside random data too the evaluation's lengths are its file's, and fewer examples than a
// micro-batch has make a smaller one.
TEST_F(ForecastTest, RandomDataLeavesTheRestAsItIs) {
  const std::string eval =
      folder_.write("eval.jsonl", "{\"input_ids\": [1, 2, 3], \"labels\": [1, 2, 3]}\n");
  const auto peak = [&](const std::string& data, const std::string& train, bool runs) {
    Library library;
    const Config c =
        load_config("", {"model.path=synthetic:tiny", "lora.r=4", "data.train=synthetic",
                         "data.eval=" + data, "train.batch_size=4", "data.seq_len=8", train});
    const std::vector<PaperTrial> gang = {runs ? paper_trial(c, library, Device::cpu())
                                               : trial_on_paper(c, library, Device::cpu())};
    return predict_memory(library.model(c.model.path), gang, Device::cpu()).peak();
  };
  for (const char* train : {"train.steps=5", "train.epochs=0.0005"})
    for (const std::string& data : {eval, std::string("synthetic")})
      EXPECT_EQ(peak(data, train, false), peak(data, train, true)) << train << " " << data;
  EXPECT_LT(peak(eval, "train.steps=5", false), peak("synthetic", "train.steps=5", true));
}

// With less memory for each the trials of a gang compute more again: one after another is faster.
TEST_F(MemoryAnswersTest, GangsAreAsLargeAsIsFast) {
  const auto gang_size = [&](const std::string& train) {
    const Sweep sweep = load_sweep(
        folder_.write("gang.yaml",
                      "base: {model: {path: \"synthetic:llama-3.1-8b\"}, lora: {r: 16}, data: "
                      "{train: synthetic, seq_len: 2048}, train: {steps: 5, batch_size: 4, " +
                          train +
                          "}}\nparallel: {trials_per_gpu: 4}\n"
                          "parameters: {optim.lr: {values: [1e-4, 2e-4, 3e-4, 4e-4]}}\n"),
        {});
    Library library;
    const std::vector<TrialForecast> trials =
        forecast(sweep, library, memory_target("h200", "auto"));
    const size_t size = trials.front().gang_size;
    for (const TrialForecast& t : trials) {
      EXPECT_EQ(t.fits, true) << t.note;
      const std::string why = "a gang of 4 is predicted to be slower together: in halves";
      EXPECT_THAT(t.note, size < 4 ? Matcher<std::string>(StartsWith(why)) : IsEmpty());
    }
    return size;
  };
  EXPECT_EQ(gang_size("recompute: auto, memory_budget: 24GiB"), 1u);
  EXPECT_EQ(gang_size("recompute: full"), 4u);
}

// A trial takes part in its own micro-batches alone.
TEST_F(MemoryAnswersTest, GangsMayAccumulateDifferently) {
  const auto trials = [&](int together) {
    const Sweep sweep = load_sweep(
        folder_.write("gang.yaml",
                      "base: {model: {path: \"synthetic:llama-3.1-8b\"}, lora: {r: 16}, data: "
                      "{train: synthetic, seq_len: 2048}, train: {steps: 5, recompute: auto}}\n"
                      "parameters: {train.grad_accum: {values: [1, 8]}}\n"
                      "parallel: {trials_per_gpu: " +
                          std::to_string(together) + "}\n"),
        {});
    Library library;
    return forecast(sweep, library, memory_target("200GB", "auto"));
  };
  const std::vector<TrialForecast> gang = trials(2), alone = trials(1);
  EXPECT_EQ(gang.front().gang_size, 2u) << gang.front().note;
  EXPECT_EQ(alone.front().gang_size, 1u);
  EXPECT_LT(gang[0].seconds + gang[1].seconds, alone[0].seconds + alone[1].seconds);
}

// What is said of the remedy is what is said when it is made.
TEST_F(MemoryAnswersTest, ARemedyHasAPrice) {
  const std::string model = "synthetic:llama-3.1-8b";
  Arguments asked = {"--gpu", "rtx3090", "--set", "data.seq_len=2048"};
  Json remedy = json(model, asked)["fits_with"];
  EXPECT_THAT(text(model, asked),
              HasSubstr(fmt::format(": peak {}, {} on the host, {} a step\n",
                                    format_bytes(remedy["peak_bytes"].get<int64_t>()),
                                    format_bytes(remedy["host_bytes"].get<int64_t>()),
                                    duration_text(remedy["step_seconds"].get<double>()))));
  for (const Json& set : remedy["set"])
    asked.insert(asked.end(), {"--set", set.get<std::string>()});
  Json made = json(model, asked);
  EXPECT_EQ(made["fits"], true);
  for (const char* key : {"peak_bytes", "host_bytes", "step_seconds"})
    EXPECT_EQ(made[key], remedy[key]) << key;
}

// Room that an assumed context may not leave is named as such, wherever something fits.
TEST_F(MemoryAnswersTest, BarelyIsSaid) {
  const auto shown = [&](const std::string& set, bool json = false) {
    Arguments asked = {
        "memory", "synthetic:llama-3.1-8b", "--gpu", "t4", "--set", "lora.r=16", "--set", set};
    if (json) asked.emplace_back("--json");
    return run(asked).out;
  };
  EXPECT_THAT(shown("model.streamed_layers=0"),
              AllOf(HasSubstr("would fit with --set model.streamed_layers=5: "),
                    HasSubstr(" a step; barely: 38.68 MB free, and the context is assumed: ")));
  EXPECT_THAT(shown("model.streamed_layers=5"),
              HasSubstr("fits barely: 38.68 MB free, and the context is assumed: an H100's takes "
                        "444.60 MB more"));
  EXPECT_THAT(shown("model.streamed_layers=16"),
              AllOf(HasSubstr("  fits\n"), Not(HasSubstr("barely"))));
  const int64_t peak = Json::parse(shown("model.streamed_layers=5", true))["peak_bytes"];
  MemoryTarget target = memory_target("t4", "auto");
  EXPECT_NE(barely_text(target, peak), "");
  target.gpu->measured = true;
  EXPECT_EQ(barely_text(target, peak), "");
  const std::string file = folder_.write(
      "two.yaml",
      "base: {model: {path: \"synthetic:llama-3.1-8b\", streamed_layers: 5}, lora: {r: 16}, data: "
      "{train: synthetic}, train: {steps: 1}}\nseeds: [0, 1]\n");
  const Ended table = run({"memory", file, "--gpu", "t4"});
  EXPECT_THAT(table.out, AllOf(HasSubstr(" barely\n"), HasSubstr("\nbarely: 38.68 MB free")))
      << table.err;
}

TEST_F(MemoryAnswersTest, ABudgetThatNothingHeedsIsSaid) {
  const Arguments budget = {"--gpu", "24GiB", "--set", "train.memory_budget=1GB"};
  const auto with = [&](const std::string& set) {
    Arguments all = budget;
    all.insert(all.end(), {"--set", set});
    return text("synthetic:tiny", all);
  };
  const std::string warning = "train.memory_budget: 1GB has no effect";
  EXPECT_THAT(text("synthetic:tiny", budget), HasSubstr(warning));
  EXPECT_THAT(with("train.recompute=full"),
              AllOf(HasSubstr(warning), HasSubstr("train.recompute: full plans nothing")));
  EXPECT_THAT(with("train.recompute=auto"), Not(HasSubstr("no effect")));
  EXPECT_THAT(with("optim.type=paged_adamw"), Not(HasSubstr("no effect")));
  EXPECT_THAT(text("synthetic:tiny", {"--gpu", "24GiB"}), Not(HasSubstr("no effect")));
  for (const bool dry : {true, false}) {
    Arguments train = {"train", run_file(), "--set", "train.memory_budget=1GB", "--device", "cpu"};
    if (dry) train.emplace_back("--dry-run");
    const Ended ended = run(train);
    EXPECT_EQ(ended.code, 0) << ended.err;
    EXPECT_THAT(ended.out + ended.err, HasSubstr(warning));
  }
}

TEST_F(MemoryAnswersTest, BytesWithoutTheirUnitAreRefused) {
  const std::string hint = "did you mean 24GiB?";
  for (const char* option : {"--gpu", "--device-memory", "--host-memory"})
    expect_refused({"memory", "synthetic:tiny", option, "24"}, {option, "24", hint});
  expect_refused({"train", run_file(), "--device-memory", "24"}, {"--device-memory 24", hint});
  for (const char* key : {"train.memory_budget", "quant.resident"})
    expect_refused({"memory", "synthetic:tiny", "--set", std::string(key) + "=24"}, {key, hint});
  text("synthetic:tiny", {"--gpu", "25769803776", "--set", "quant.resident=0", "--host-memory", "0",
                          "--set", "train.memory_budget=24kB"});
}

TEST(Gpus, AreNamesOrBytes) {
  constexpr int64_t GiB = int64_t{1} << 30;
  EXPECT_EQ(find_gpu("H100-80GB").memory_bytes, int64_t{81559} << 20);
  for (const auto& [given, bytes] : std::map<std::string, int64_t>{{"24GiB", 24 * GiB},
                                                                   {"24 GiB", 24 * GiB},
                                                                   {"24 gib", 24 * GiB},
                                                                   {"24gb", 24'000'000'000},
                                                                   {"1KB", 1000},
                                                                   {"0.5GiB", GiB / 2},
                                                                   {".5GiB", GiB / 2},
                                                                   {"24e9", 24'000'000'000},
                                                                   {"24TB", 24'000'000'000'000},
                                                                   {"1kB", 1000},
                                                                   {"1048576", 1048576}})
    EXPECT_EQ(find_gpu(given).memory_bytes, bytes) << given;
  for (const char* bare : {"0.5", "24", "24 ", "2.4e1", "1048575"})
    EXPECT_THAT(error_of([&] { find_gpu(bare); }), HasSubstr("too few; did you mean ")) << bare;
  for (const char* wrong : {"-24GiB", "nan", "inf", "1e99", "1e99GB", "24GB ", " 24GB", "24G", "0",
                            "0GB", "0x10GB", "24,000", "24GiB 1", "h100"})
    for (const auto& read : {+[](const std::string& t) { find_gpu(t); },
                             +[](const std::string& t) { parse_device_memory(t); }})
      EXPECT_THAT(error_of([&] { read(wrong); }),
                  AllOf(HasSubstr(wrong), HasSubstr("24GiB"), HasSubstr("KiB, MiB, GiB, TiB")));
  for (const char* far : {"-24GiB", "0", "0GB", "1e30GB"}) {
    EXPECT_THAT(error_of([&] { find_gpu(far); }), HasSubstr(": out of range")) << far;
    EXPECT_THAT(error_of([&] { parse_device_memory(far); }), HasSubstr(": out of range")) << far;
  }
  EXPECT_THAT(error_of([] { find_gpu("24G"); }), HasSubstr(": unknown"));
  EXPECT_THAT(error_of([] { find_gpu("h100"); }), HasSubstr("unknown; did you mean h100-80gb?"));
  EXPECT_THAT(error_of([] { find_gpu("A100"); }), HasSubstr("mean a100-40gb or a100-80gb?"));
  EXPECT_THAT(error_of([] { find_gpu("rtx409"); }), HasSubstr("did you mean rtx4090?"));
  EXPECT_EQ(parse_host_memory("0GB"), 0);
  EXPECT_THAT(error_of([] { parse_host_memory("-1"); }), HasSubstr("KiB, MiB, GiB, TiB"));
}

TEST_F(MemoryAnswersTest, EmptyTextsAreRefused) {
  for (const char* option : {"--gpu", "--device-memory", "--host-memory", "--table", "--check"})
    expect_refused({"memory", "synthetic:tiny", option, ""}, {option, "not an empty text"});
  expect_refused({"memory", ""}, {"not an empty text"});
  expect_refused({"train", run_file(), "--device-memory", ""}, {"not an empty text"});
}

TEST_F(MemoryAnswersTest, NumbersOfAnyLengthEndInOneColumn) {
  const std::string shown = text("synthetic:tiny", {"--gpu", "999999TB"});
  const size_t at = shown.find("  free of 999999.00 TB");
  ASSERT_NE(at, std::string::npos);
  const std::string line = shown.substr(at, shown.find('\n', at) - at);
  EXPECT_THAT(line, HasSubstr(" TB 999,998,999,"));
  EXPECT_EQ(line.find("  fits"), 64u);
  const size_t peak = shown.find("  peak "), end = shown.find('\n', peak);
  EXPECT_EQ(end - peak, 64u);
  EXPECT_THAT(shown, HasSubstr("\n  driver, CUDA context, libraries "));
}

TEST_F(MemoryAnswersTest, OfInt8TheBytesAlone) {
  const Arguments l4 = {"--gpu", "l4", "--set", "load_in_8bit=true"};
  EXPECT_THAT(text("synthetic:tiny", l4),
              AllOf(HasSubstr("bytes alone: no run computes with int8"), Not(HasSubstr("fits")),
                    Not(HasSubstr("a step in"))));
  Json said = json("synthetic:tiny", l4);
  EXPECT_EQ(said["fits"], nullptr);
  EXPECT_EQ(said["step_seconds"], nullptr);
  EXPECT_EQ(said["refused"], "bytes alone: no run computes with int8");
  EXPECT_GT(said["peak_bytes"], 0);
  EXPECT_FALSE(json("synthetic:tiny", {"--gpu", "l4"}).contains("refused"));
}

TEST_F(MemoryAnswersTest, AConfigurationAloneHasShapes) {
  const LlamaConfig c = synthetic_config("tiny");
  Json config = {{"model_type", "llama"},
                 {"torch_dtype", "bfloat16"},
                 {"vocab_size", c.vocab_size},
                 {"hidden_size", c.hidden_size},
                 {"intermediate_size", c.intermediate_size},
                 {"num_hidden_layers", c.num_hidden_layers},
                 {"num_attention_heads", c.num_attention_heads},
                 {"num_key_value_heads", c.num_key_value_heads},
                 {"max_position_embeddings", c.max_position_embeddings},
                 {"tie_word_embeddings", c.tie_word_embeddings}};
  folder_.write("config.json", config.dump());
  const std::string folder = folder_ / ".";
  const Arguments short_batch = {"--gpu", "t4", "--set", "data.seq_len=64"};
  Json said = json(folder, short_batch), expected = json("synthetic:tiny", short_batch);
  EXPECT_THAT(std::string(said["assumed"]), HasSubstr("shapes by config.json"));
  for (const char* key : {"resident", "categories", "peak_bytes", "footprint_bytes", "timeline"})
    EXPECT_EQ(said[key], expected[key]) << key;
  expect_refused({"train", run_file(), "--set", "model.path=" + folder, "--device", "cpu"},
                 {"model.safetensors"});
  const auto list = [&](const std::string& model, const std::string& data) {
    const Ended ended =
        run({"train", run_file("train: {steps: 2}\n"), "--set", "model.path=" + model, "--set",
             "data.train=" + data, "--device", "cpu", "--dry-run"});
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.out;
  };
  // Of one line a trial, the peak and what follows.
  const auto needs = [](const std::string& shown) {
    const size_t line = shown.find("\nrun-"), seed = shown.find("  0     ", line);
    return shown.substr(seed, shown.find('\n', seed) - seed);
  };
  const std::string peak = needs(list("synthetic:tiny", "synthetic"));
  EXPECT_THAT(peak, AllOf(HasSubstr("MB"), HasSubstr("yes"), Not(HasSubstr("?"))));
  const std::string random = list(folder, "synthetic"), own = list(folder, train_);
  EXPECT_EQ(needs(random), peak);
  EXPECT_EQ(needs(own), peak);
  for (const std::string& shown : {random, own})  // whose evaluation is a file
    EXPECT_THAT(shown, HasSubstr("s0: the tokenizer is not here: full batches of data.seq_len; the "
                                 "weights are not here: shapes by config.json"));
}

// Text has no lengths without a tokenizer, and a forecast does with full batches.
TEST_F(MemoryAnswersTest, ASyntheticModelIsPredictedOnText) {
  const std::string data = folder_.write("text.jsonl", "\n{\"text\": \"x\"}\n");
  const std::string file = folder_.write(
      "text.yaml", "base: {model: {path: \"synthetic:tiny\"}, train: {steps: 2}, data: {train: " +
                       data + "}}\nparameters: {lora.r: {values: [4, 8]}}\n");
  const std::string why = "the model has no tokenizer: full batches of data.seq_len";
  for (const Arguments& asked : {Arguments{"memory", file, "--gpu", "t4"},
                                 {"sweep", file, "--device", "cpu", "--dry-run"}}) {
    const Ended shown = run(asked);
    EXPECT_EQ(shown.code, 0) << shown.err;
    EXPECT_THAT(shown.out,
                AllOf(HasSubstr("all 2 trials: " + why), HasSubstr("yes"), Not(HasSubstr("?"))));
  }
  const Ended one = run({"memory", "synthetic:tiny", "--gpu", "t4", "--set", "lora.r=4", "--set",
                         "data.train=" + data, "--json"});
  Json said = Json::parse(one.out), full = json("synthetic:tiny", {"--gpu", "t4"});
  EXPECT_EQ(said["assumed"], why);
  EXPECT_EQ(said["peak_bytes"], full["peak_bytes"]);
  expect_refused({"sweep", file, "--device", "cpu"},
                 {"text.jsonl:2: the model has no tokenizer", "may be synthetic"});
}

// What the list says of each trial, for programs.
TEST_F(MemoryAnswersTest, ASweepIsOneObject) {
  const std::string file = folder_.write(
      "list.yaml",
      "base: {model: {path: \"synthetic:tiny\"}, lora: {r: 4}, train: {steps: 5}, data: {train: "
      "synthetic}, parallel: {trials_per_gpu: 2}}\nseeds: [0, 1]\n"
      "parameters: {quant.type: {values: [nf4, int8]}}\n");
  Json said = json(file, {"--gpu", "t4"});
  EXPECT_EQ(said["device"], "t4");
  EXPECT_EQ(said["rates"], "datasheet");
  EXPECT_EQ(said["limit_bytes"], find_gpu("t4").usable());
  ASSERT_EQ(said["trials"].size(), 4u);
  const MemoryTarget target = memory_target("t4", "auto");
  Library library;
  const std::vector<TrialForecast> trials = forecast(load_sweep(file, {}), library, target);
  const Json& nf4 = said["trials"][1];
  EXPECT_EQ(nf4["name"], "nf4-s1");
  EXPECT_EQ(nf4["set"], (Json{{"quant.type", "nf4"}}));
  EXPECT_EQ(nf4["seed"], 1);
  EXPECT_EQ(nf4["gang"], 1);
  EXPECT_EQ(nf4["gang_size"], 2);
  EXPECT_EQ(nf4["peak_bytes"], trials[1].peak);
  EXPECT_EQ(nf4["seconds"], trials[1].seconds);
  EXPECT_EQ(nf4["fits"], true);
  EXPECT_EQ(nf4["note"], "");
  const Json& int8 = said["trials"][2];
  EXPECT_EQ(int8["fits"], nullptr);
  EXPECT_EQ(int8["seconds"], nullptr);
  EXPECT_THAT(std::string(int8["note"]), HasSubstr("bytes alone"));
  const std::string unlimited = folder_.write("one.yaml",
                                              "base: {model: {path: \"synthetic:tiny\"}, data: "
                                              "{train: synthetic}}\nseeds: [0, 1]\n");
  const Json alone = json(unlimited, {"--device", "cpu"})["trials"][0];
  EXPECT_EQ(alone["gang"], nullptr);
  EXPECT_EQ(alone["gang_size"], 1);
}

// The keys of the JSON that docs/memory.md lists are those that are there.
TEST_F(MemoryAnswersTest, TheDocumentationHasTheKeys) {
  if (!std::filesystem::exists("docs/memory.md"))
    GTEST_SKIP() << "not run from the root of the sources";
  const std::string docs = read_text_file("docs/memory.md");
  const std::string list = docs.substr(std::min(docs.size(), docs.find("\n## JSON\n")));
  const auto expect_listed = [&](const Json& object) {
    for (const auto& [key, value] : object.items()) EXPECT_THAT(list, HasSubstr("`" + key + "`"));
  };
  const Ended asked = run({"memory", "synthetic:llama-3.1-8b", "--gpu", "t4", "--host-memory",
                           "64GiB", "--device-memory", "9GiB", "--set", "lora.r=4", "--set",
                           "optim.type=paged_adamw", "--json"});
  ASSERT_EQ(asked.code, 0) << asked.err;
  const Json one = Json::parse(asked.out);
  ASSERT_TRUE(one.contains("fits_with") && one.contains("assumed"));
  expect_listed(one);
  for (const char* part : {"resident", "fits_with"}) expect_listed(one[part]);
  for (const char* part : {"largest", "timeline", "step"}) expect_listed(one[part][0]);
  expect_listed(json("synthetic:tiny", {"--set", "quant.type=int8", "--gpu", "t4"}));
  Json all =
      json(folder_.write("list.yaml", "base: {model: {path: \"synthetic:tiny\"}}\nseeds: [0, 1]\n"),
           {"--gpu", "t4"});
  expect_listed(all);
  expect_listed(all["trials"][0]);
}

// Where no GPU is, a run takes the CPU, and a prediction for a GPU says so.
TEST_F(MemoryAnswersTest, WithoutAGpuItSaysWhatARunWouldTake) {
  if (cuda::device_count() > 0) GTEST_SKIP() << "there is a GPU";
  const std::string note = "\nno GPU is here: ",
                    sweep = folder_.write(
                        "seeds.yaml", "base: {model: {path: \"synthetic:tiny\"}}\nseeds: [0, 1]\n");
  for (const std::string& target : {std::string("synthetic:tiny"), sweep}) {
    EXPECT_THAT(text(target, {}), AllOf(HasSubstr(note), HasSubstr("--device cpu")));
    EXPECT_THAT(std::string(json(target, {})["device_note"]), HasSubstr("--device cpu"));
    EXPECT_THAT(text(target, {"--gpu", "t4"}), Not(HasSubstr(note)));
    EXPECT_THAT(text(target, {"--device", "cpu"}), Not(HasSubstr(note)));
  }
  ASSERT_EQ(run({"train", run_file("train: {steps: 2}\n"), "--out", folder_ / "out"}).code, 0);
  const Json checked =
      Json::parse(run({"memory", "--check", folder_ / "out", "--json"}).out)["trials"][0];
  EXPECT_EQ(
      checked["training"]["measured_bytes"],
      Json::parse(run({"memory", run_file("train: {steps: 2}\n"), "--device", "cpu", "--json"})
                      .out)["peak_bytes"]);
}

TEST_F(MemoryAnswersTest, WhatNoTrialHasIsSaidOnce) {
  const std::string file =
      folder_.write("gated.yaml",
                    "base: {model: {path: some/gated-8b}, data: {train: synthetic}}\n"
                    "parameters: {lora.r: {values: [4, 8]}}\n");
  const std::string fetch = "hf download some/gated-8b config.json tokenizer.json";
  expect_refused({"memory", file, "--gpu", "t4"}, {"needs its config.json alone", fetch});
  expect_refused({"memory", "some/gated-8b", "--gpu", "t4"},
                 {"needs its config.json alone", fetch});
  const Ended list = run({"sweep", file, "--device", "cpu", "--dry-run"});
  EXPECT_EQ(list.code, 0) << list.err;
  EXPECT_THAT(list.out, AllOf(HasSubstr("all 2 trials: some/gated-8b: "), HasSubstr(fetch),
                              Not(HasSubstr("?")), Not(HasSubstr("predicted for"))));
}

TEST(Durations, AreReadable) {
  EXPECT_EQ(duration_text(9.43e-5), "0.0943 ms");
  EXPECT_EQ(duration_text(0.00158), "1.58 ms");
  EXPECT_EQ(duration_text(0.708), "0.708 s");
  EXPECT_EQ(duration_text(21), "21 s");
  EXPECT_EQ(duration_text(180), "3 min");
  EXPECT_EQ(duration_text(4320), "1.2 h");
  EXPECT_EQ(duration_text(3600 * 1234.4), "1234 h");
}

}  // namespace
}  // namespace qlab::test
