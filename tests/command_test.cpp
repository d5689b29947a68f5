// The qlab command as a user meets it: exit codes, messages, and what it leaves on the disk.
#include <csignal>
#include <thread>

#include "core/device.h"
#include "tests/support/command.h"
#include "tests/support/tiny_model.h"

namespace qlab::test {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

TEST_F(CommandTest, MistakesInYaml) {
  expect_refused_run("train: {stps: 4}\n", {"run.yaml:4", "stps", "did you mean", "steps"});
  expect_refused_run("optim.lr: fast\n", {"run.yaml:4", "optim.lr", "\"fast\""});
  expect_refused_run("train: {steps: -1}\n", {"run.yaml:4", "train.steps"});
  expect_refused_run("lora: {r: 4}\n", {"run.yaml", "lora"});
  expect_refused_run("train: {steps: 4\n", {"run.yaml"});
  expect_refused({"train", run_file(), "--set", "lora.rr=4"}, {"--set lora.rr=4", "lora.r"});
  expect_refused({"train", "nowhere.yaml"}, {"nowhere.yaml"});
  const auto sweep = [&](const std::string& text) {
    return folder_.write("sweep.yaml", "base: " + run_file() + "\n" + text);
  };
  expect_refused({"sweep", sweep("parameters: {lora.r: {values: [4]}}\nexclude: [lora.r == 4]\n")},
                 {"sweep.yaml", "the sweep is empty"});
  expect_refused({"sweep", sweep("parameters: {lora.r: {values: []}}\n")},
                 {"sweep.yaml:2", "empty"});
  expect_refused({"sweep", sweep(""), "--shard", "3/2"}, {"3/2"});
  const std::string no_lora =
      folder_.write("bare.yaml", "model: {path: \"synthetic:tiny\"}\ndata: {train: synthetic}\n");
  expect_refused({"train", no_lora}, {"bare.yaml", "lora"});
}

TEST_F(CommandTest, ARunFileIsToldFromASweepWhateverComesFirst) {
  const std::string file = folder_.write(
      "sweep.yaml", "name: ranks\nbase: " + run_file() + "\nparameters: {lora.r: {values: [4]}}\n");
  expect_refused({"train", file}, {"sweep.yaml:2", "belongs to a sweep", "use qlab sweep"});
}

TEST_F(CommandTest, ErrorsNameThePlace) {
  const auto replaced = [&](const std::string& what, const std::string& by) {
    std::string text = read_text_file(run_file());
    text.replace(text.find(what), what.size(), by);
    return folder_.write("run.yaml", text);
  };
  expect_refused({"train", replaced(train_, "gone.jsonl")},
                 {"run.yaml:2: data.train: there is no file gone.jsonl"});
  expect_refused({"train", replaced(eval_, "gone.jsonl")},
                 {"run.yaml:2: data.eval: there is no file gone.jsonl"});
  expect_refused({"train", replaced("synthetic:tiny", "gone.gguf")},
                 {"run.yaml:1: model.path: gone.gguf"});
  expect_refused({"train", replaced("r: 4", "targets: [c_attn]")},
                 {"run.yaml:3: lora.targets: no module matches c_attn"});
  const TemporaryFolder model;
  const std::string here = "model.path=" + write_model(model, 2, false);
  expect_refused({"train", run_file(), "--set", here, "--set", "data.seq_len=600"},
                 {"--set data.seq_len=600: data.seq_len: 600 exceeds the 512 positions"});
  expect_refused({"train", replaced("eval_seq_len: 64", "eval_seq_len: 600"), "--set", here},
                 {"run.yaml:2: data.eval_seq_len: 600 exceeds the 512 positions"});
  expect_refused_run("load_in_8bit: true\n", {"run.yaml:4: quant.type", "int8", "set nf4"});
  expect_refused({"sweep", folder_.write("sweep.yaml", "base: " + run_file() +
                                                           "\nparameters:\n  quant.type:\n"
                                                           "    values: [nf4, int8]\n")},
                 {"sweep.yaml:", "quant.type", "int8", "set nf4"});
  const std::string int8 = "quant.type=int8";
  expect_refused({"eval", "gone", "--data", "gone", "--set", int8}, {"--set " + int8, "set nf4"});
  expect_refused({"generate", "gone", "--prompt", "x", "--set", int8},
                 {"--set " + int8, "set nf4"});
  expect_refused_run("optim: adafactor\n", {"run.yaml:4: optim", "adafactor", "paged_adamw8bit",
                                            "other optimizers are not supported"});
}

TEST_F(CommandTest, MistakesOnTheCommandLine) {
  EXPECT_EQ(run({"--help"}).code, 0);
  const std::string help = run({"memory", "--help"}).out;
  EXPECT_THAT(help, HasSubstr("--gpu TEXT"));
  EXPECT_EQ(help.find("Excludes"), help.npos);
  EXPECT_THAT(run({"train", "--help"}).out, HasSubstr("--replicas N=1"));
  EXPECT_EQ(run({"sweep", "--help"}).out.find("--replicas"), help.npos);
  const Ended version = run({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, StartsWith("qlab "));
  for (const Arguments& arguments : {Arguments{},
                                     {"trian"},
                                     {"train"},
                                     {"train", "a", "--dry"},
                                     {"generate", "synthetic:tiny"}}) {
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 2) << testing::PrintToString(arguments);
    EXPECT_THAT(ended.err, StartsWith("qlab: "));
  }
  expect_refused({"trian", "x.yaml"},
                 {"trian: there is no such subcommand; did you mean train? (sweep, train, "});
  expect_refused({"--verion"}, {"--verion: there is no such option; did you mean --version?"});
  expect_refused({"--set", "lora.r=8", "train", run_file()},
                 {"--set: options come behind the subcommand, as in qlab train FILE --set"});
  expect_refused({"-q", "train", run_file()}, {"-q: there is no such option (qlab --help"});
  expect_refused({"frobnicate"}, {"frobnicate: there is no such subcommand (sweep, train, "});
  expect_refused({"train", run_file(), "--out", ""}, {"--out", "not an empty text"});
  expect_refused({"generate", "x", "--prompt", "x", "--temperature", "-1"},
                 {"--temperature", "-1 is no temperature"});
  expect_refused({"generate", "x", "--prompt", "x", "--temperature", "warm"},
                 {"--temperature", "warm is no temperature"});
  for (const char* option : {"--top-p=0.5", "--seed=3"})
    expect_refused({"generate", "x", "--prompt", "x", option},
                   {std::string(option).substr(0, 6), "changes nothing at --temperature 0"});
  for (const char* count : {"0", "-1", "many", "1.5", ""})
    expect_refused({"generate", "x", "--prompt", "x", "--max-new-tokens", count},
                   {"--max-new-tokens", "is no whole number from 1 up"});
  for (const char* share : {"1.5", "-0.1", "half"})
    expect_refused({"generate", "x", "--prompt", "x", "--top-p", share},
                   {"--top-p", std::string(share) + " is no share of the probability"});
  expect_refused({"generate", "x", "--prompt", "x", "--seed", "-1"}, {"--seed", "-1 is below 0"});
  expect_refused({"train", run_file(), "--shard", "2/2"}, {"--shard"});
  expect_refused({"train", run_file(), "--outt=x"},
                 {"--outt: qlab train has no such option; did you mean --out?"});
  expect_refused({"eval", "x", "--dta", "y"}, {"--dta: qlab eval", "did you mean --data?"});
  expect_refused({"eval", "x", "-dta", "y"}, {"-dta: qlab eval", "did you mean --data?"});
  expect_refused({"eval", "x", "--frobnicate"}, {"--frobnicate: qlab eval has no such option ("});
  expect_refused({"eval", "x"}, {"--data is required"});
  expect_refused({"tokenize", "synthetic:tiny", run_file()}, {"synthetic:tiny", "tokenizer.json"});
  expect_refused({"generate", "synthetic:tiny", "--prompt", "x"}, {"synthetic:tiny", "tokenizer"});
  const std::string tokenizer = fs::absolute(golden("tokenizer/llama3.json")).string();
  expect_refused({"tokenize", tokenizer, "."}, {".: is a directory; give a text file"});
  expect_refused({"tokenize", tokenizer, "gone.txt"}, {"gone.txt: cannot be read"});
  expect_refused({"train", run_file(), "--device", "gpu"}, {"gpu", "cuda"});
  expect_refused({"train", run_file(), "--device=cpu", "--device=cpu"},
                 {"--device is given 2 times: keep one"});
}

TEST_F(CommandTest, NoGpu) {
  if (cuda::device_count() > 0) GTEST_SKIP() << "needs a machine without a GPU";
  expect_refused({"train", run_file(), "--device", "cuda"}, {"cuda", "--device cpu"});
  expect_refused({"eval", "synthetic:tiny", "--data", eval_, "--device", "cuda:1"}, {"cuda:1"});
}

TEST_F(CommandTest, MissingModels) {
  const auto with = [](const std::string& path) { return "model.path=" + path; };
  expect_refused({"train", run_file(), "--set", with("gone/model.gguf")}, {"gone/model.gguf"});
  expect_refused({"train", run_file(), "--set", with("synthetic:huge")},
                 {"synthetic:huge", "llama-3.1-8b"});
  expect_refused({"inspect", "some-org/Some-Model"},
                 {"some-org/Some-Model", "hf download some-org/Some-Model"});
  fs::create_directory(folder_ / "empty");
  expect_refused({"report", folder_ / "gone"}, {"gone: there is no such directory"});
  expect_refused({"report", folder_ / "empty"}, {"empty: there is no plan.yaml"});
  expect_refused({"inspect", folder_ / "empty"}, {"empty", "config.json"});
  folder_.write("empty/model.gguf", "");
  for (const Arguments& command :
       {Arguments{"inspect"}, {"tokenize"}, {"generate", "--prompt=x"}}) {
    Arguments arguments = command;
    arguments.push_back(folder_ / "empty");
    expect_refused(arguments, {"did you mean", "empty/model.gguf?"});
  }
}

TEST_F(CommandTest, DamagedModels) {
  const std::string model = fs::absolute(golden("model_files")).string();
  const std::string gguf = read_text_file(model + "/llama.gguf");
  for (const size_t keep : {size_t{3}, size_t{100}, gguf.size() / 2, gguf.size() - 1})
    expect_refused({"inspect", folder_.write("cut.gguf", gguf.substr(0, keep))}, {"cut.gguf"});
  expect_refused({"inspect", folder_.write("text.gguf", std::string(500, 'x'))}, {"text.gguf"});

  const std::string config = read_text_file(model + "/llama/config.json"),
                    weights = read_text_file(model + "/llama/model.safetensors");
  const auto inspect = [&](const std::string& new_config, const std::string& new_weights,
                           const std::vector<std::string>& parts) {
    folder_.write("model/config.json", new_config);
    folder_.write("model/model.safetensors", new_weights);
    expect_refused({"train", run_file(), "--set", "model.path=" + folder_ / "model"}, parts);
  };
  inspect(config, weights.substr(0, weights.size() / 2), {"model.safetensors"});
  std::string lying = weights;
  lying[6] = '\x7f';  // a header of 35 PB
  inspect(config, lying, {"model.safetensors", "header"});
  std::string longer = weights;
  const size_t at = longer.find("\"shape\":[");
  ASSERT_NE(at, std::string::npos);
  longer[at + 9] = '9';
  inspect(config, longer, {"model.safetensors"});
  const auto edited = [&](const std::string& key, const nlohmann::json& value) {
    auto json = nlohmann::json::parse(config);
    json[key] = value;
    return json.dump();
  };
  inspect(edited("model_type", "gpt2"), weights, {"gpt2", "llama, mistral, qwen2"});
  inspect(edited("hidden_act", "gelu"), weights, {"gelu", "silu"});
  inspect(edited("hidden_size", "wide"), weights, {"hidden_size"});
  inspect("{", weights, {"config.json"});
  const std::string fits = edited("head_dim", 8);  // the file has 6
  inspect(fits, weights, {"model.safetensors", "q_proj.weight", "[24, 24]", "[32, 24]"});
}

TEST_F(CommandTest, Targets) {
  expect_refused({"train", run_file(), "--set", "lora.targets=[c_attn]"}, {"c_attn", "q_proj"});
  expect_refused({"inspect", "synthetic:tiny", "--set", "lora.targets=q_pro"}, {"q_pro", "q_proj"});
}

TEST_F(CommandTest, Data) {
  const auto with = [&](const std::string& text, const std::vector<std::string>& parts) {
    expect_refused({"train", run_file(), "--set", "data.train=" + folder_.write("bad.jsonl", text)},
                   parts);
  };
  const std::string good = "{\"input_ids\": [1, 2], \"labels\": [1, 2]}\n";
  with(good + good + "{not json}\n", {"bad.jsonl:3"});
  with(good + "[1]\n", {"bad.jsonl:2"});
  with(good + "{\"input_ids\": [1, 512], \"labels\": [1, 2]}\n", {"bad.jsonl:2", "512"});
  with(good + "{\"input_ids\": [1, 2], \"labels\": [1]}\n", {"bad.jsonl:2", "aligned"});
  with("{\"input_ids\": [1, 2], \"labels\": [1, -100]}\n", {"bad.jsonl", "token to train"});
  with("", {"bad.jsonl"});
  for (const char* line : {R"({"text": "x"})", R"({"prompt": "x", "completion": "y"})",
                           R"({"messages": [{"role": "user", "content": "x"}]})"})
    with(good + line, {"bad.jsonl:2: the model has no tokenizer", "input_ids and labels"});
  expect_refused({"train", run_file(), "--set", "data.train=gone.jsonl"}, {"gone.jsonl"});
  expect_refused({"train", run_file(), "--set", "data.eval=gone.jsonl"}, {"gone.jsonl"});
  expect_refused({"eval", "synthetic:tiny", "--data", "gone.jsonl"}, {"gone.jsonl"});
  expect_refused({"eval", "synthetic:tiny", "--data", eval_, "--adapter", "gone"}, {"gone"});
}

TEST_F(CommandTest, AnUnwritableDirectory) {
  folder_.write("file", "");
  const Ended ended =
      run({"train", run_file("train: {steps: 1}\n"), "--out", folder_ / "file/results"});
  EXPECT_EQ(ended.code, 2);
  EXPECT_THAT(ended.err, AllOf(StartsWith("qlab: "), HasSubstr("file/results")));
  // Found before the data is read.
  expect_refused(
      {"train", run_file(), "--set", "data.train=gone.jsonl", "--out", folder_ / "file/results"},
      {"file/results", "--out"});
}

TEST_F(CommandTest, ThreadsDoNotSpin) {
  const pid_t pid = start({"train", run_file("train: {steps: 100000}\n"), "--device", "cpu"});
  const auto file = [&](const char* name) {
    std::ifstream in(fmt::format("/proc/{}/{}", pid, name));
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  const auto environment = [&] { return file("environ"); };
  for (int i = 0; i < 500 && environment().find("OMP_WAIT_POLICY") == std::string::npos; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_THAT(environment(), HasSubstr("OMP_WAIT_POLICY=passive"));
  EXPECT_EQ(file("comm"), "qlab\n");
  // Either way of stopping: before there is a state, or with one.
  kill(pid, SIGTERM);
  const Ended ended = wait(pid);
  EXPECT_THAT(ended.code, testing::AnyOf(130, 128 + SIGTERM)) << ended.out << ended.err;
}

TEST_F(CommandTest, DryRunWritesNothing) {
  const Ended ended = run({"sweep", run_file(), "--dry-run"});
  EXPECT_EQ(ended.code, 0);
  EXPECT_THAT(ended.out, HasSubstr("run-s0"));
  EXPECT_EQ(ended.out.find("not here"), std::string::npos);
  EXPECT_THAT(ended.out, AllOf(HasSubstr("peak"), HasSubstr("predicted for"), HasSubstr("yes")));
  const Ended elsewhere = run({"train", run_file(), "--dry-run", "--set", "data.eval=gone.jsonl"});
  EXPECT_EQ(elsewhere.code, 0);
  EXPECT_THAT(elsewhere.out, HasSubstr("data.eval: there is no file gone.jsonl"));
  EXPECT_TRUE(fs::is_empty(work_));
}

TEST_F(CommandTest, KeysThatChangeNothingAreRefused) {
  for (const char* set : {"lora.r=8", "optim.lr=1", "train.steps=3", "parallel.trials_per_gpu=2",
                          "quant.resident=0", "data.seq_len=8", "data.eval=x"}) {
    const std::string place = std::string("--set ") + set;
    expect_refused({"eval", "synthetic:tiny", "--data", eval_, "--set", set},
                   {place, "changes nothing here", "quant.type", "data.eval_seq_len"});
    expect_refused({"generate", "gone", "--prompt", "x", "--set", set},
                   {place, "changes nothing here", "quant.type"});
  }
  const Ended cut = run({"eval", "synthetic:tiny", "--data", "synthetic", "--set",
                         "data.eval_seq_len=8", "--set", "quant.type=bf16"});
  EXPECT_THAT(cut.out, HasSubstr("cut at 8 tokens")) << cut.err;
  expect_refused({"inspect", "synthetic:tiny", "--set", "train.steps=3"}, {"quant, lora"});
  expect_refused({"eval", "synthetic:tiny", "--data", eval_, "--set", "model.path=x"},
                 {"--set model.path=x", "first argument"});
}

TEST_F(CommandTest, AShardWithoutTrialsSaysSo) {
  const std::string file = run_file("train: {steps: 1}\n");
  for (const Arguments& more : {Arguments{"--dry-run"}, {"--out", folder_ / "out"}}) {
    Arguments arguments = {"sweep", file, "--device", "cpu", "--shard", "2/2"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    EXPECT_THAT(ended.out + ended.err, HasSubstr("shard 2/2 holds none of the trials"));
  }
}

TEST_F(CommandTest, EvalReadsWhatTrainWrote) {
  const Arguments set = {"--device", "cpu", "--set", "data.eval_seq_len=64"};
  Arguments arguments = {"train", run_file("train: {steps: 8, batch_size: 3}\noptim: {lr: 5e-3}\n"),
                         "--out", "results"};
  arguments.insert(arguments.end(), set.begin(), set.end());
  const Ended trained = run(arguments);
  ASSERT_EQ(trained.code, 0) << trained.err;
  std::string trial;
  for (const auto& entry : fs::directory_iterator(work_ + "/results/trials"))
    trial = entry.path().string();
  const auto status = nlohmann::json::parse(read_text_file(trial + "/status.json"));
  const auto eval = [&](const Arguments& more) {
    Arguments all = {"eval", "synthetic:tiny", "--data", eval_, "--json"};
    all.insert(all.end(), set.begin(), set.end());
    all.insert(all.end(), more.begin(), more.end());
    const Ended ended = run(all);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return nlohmann::json::parse(ended.out);
  };
  EXPECT_EQ(eval({})["loss"], status["eval_loss_0"]);
  EXPECT_EQ(eval({"--adapter", trial + "/adapter"})["loss"], status["eval_loss"]);
  EXPECT_EQ(eval({})["examples"], 5);
  EXPECT_EQ(run({"report", work_ + "/results"}).code, 0);
  for (const char* file : {"plan.yaml", "summary.csv", "summary.md", "report.html"})
    EXPECT_TRUE(fs::exists(work_ + "/results/" + file)) << file;
}

TEST_F(CommandTest, RunsStartedTogetherAreAllInTheSummary) {
  const std::string file = run_file("train: {steps: 2, batch_size: 3}\n");
  std::vector<pid_t> started;
  for (const char* r : {"2", "3", "4", "5"})
    started.push_back(start({"train", file, "--device", "cpu", "--out", "results", "--set",
                             std::string("lora.r=") + r}));
  for (const pid_t pid : started) EXPECT_EQ(wait(pid).code, 0);
  const std::string summary = read_text_file(work_ + "/results/summary.csv");
  EXPECT_EQ(std::count(summary.begin(), summary.end(), '\n'), 5) << summary;
  EXPECT_EQ(summary.find("running"), std::string::npos) << summary;
}

class KillTest : public CommandTest {
 protected:
  static constexpr const char* schedule =
      "train: {steps: 120, batch_size: 3, save_every: 25, eval_every: 40}\noptim: {lr: 5e-3}\n";

  Arguments sweep(const std::string& out) const {
    const std::string file =
        folder_.write("sweep.yaml", "base: " + run_file(schedule) +
                                        "\nparallel: {trials_per_gpu: 2}\n"
                                        "parameters: {lora.r: {values: [2, 4]}}\n");
    return {"sweep", file, "--device", "cpu", "--out", out};
  }
  std::map<std::string, std::string> results(const std::string& out) const {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(work_ + "/" + out + "/trials"))
      for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors"})
        files[entry.path().filename().string() + "/" + name] =
            read_text_file(entry.path().string() + "/" + name);
    return files;
  }
  /// Steps done so far by the trial that has done most.
  int64_t steps(const std::string& out) const {
    int64_t most = 0;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(work_ + "/" + out + "/trials", ignored)) {
      std::ifstream file(entry.path() / "metrics.jsonl");
      int64_t lines = 0;
      for (std::string line; std::getline(file, line);)
        lines += line.find("grad_norm") != line.npos;
      most = std::max(most, lines);
    }
    return most;
  }
  /// Sends the signal once `step` steps have been done.
  Ended interrupt(const std::string& out, int signal, int64_t step) const {
    const pid_t pid = start(sweep(out));
    const auto ended = [&] {
      siginfo_t info{};
      waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT);
      return info.si_pid == pid;
    };
    while (steps(out) < step && !ended()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    kill(pid, signal);
    return wait(pid);
  }
  void expect_as_if_never_stopped(const std::string& out) const {
    const Ended whole = run(sweep("whole")), rest = run(sweep(out));
    ASSERT_EQ(whole.code, 0) << whole.err;
    ASSERT_EQ(rest.code, 0) << rest.err;
    EXPECT_THAT(rest.out, HasSubstr(": continues at step "));
    EXPECT_EQ(whole.out.find(": continues at step "), std::string::npos);
    EXPECT_TRUE(results(out) == results("whole"));
    EXPECT_EQ(results(out).size(), 4u);
  }
};

TEST_F(KillTest, CtrlCSavesTheStateAndTheNextRunContinues) {
  const Ended ended = interrupt("stopped", SIGINT, 7);
  EXPECT_EQ(ended.code, 130) << ended.out << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("interrupted"));
  EXPECT_THAT(ended.err, HasSubstr("qlab: stopping after this step; what was trained is saved"));
  for (const auto& entry : fs::directory_iterator(work_ + "/stopped/trials")) {
    const auto status =
        nlohmann::json::parse(read_text_file(entry.path().string() + "/status.json"));
    EXPECT_EQ(status["status"], "interrupted");
    EXPECT_GE(status["steps"], 7);
    EXPECT_LT(status["steps"], 25);  // before save_every
    EXPECT_TRUE(fs::exists(entry.path() / "state/state.safetensors"));
  }
  expect_as_if_never_stopped("stopped");
}

TEST_F(KillTest, FiveKillsChangeNothing) {
  for (const int64_t step : {3, 31, 52, 88, 113}) {
    const Ended ended = interrupt("killed", SIGKILL, step);
    EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.out << ended.err;
  }
  expect_as_if_never_stopped("killed");
}

}  // namespace
}  // namespace qlab::test
