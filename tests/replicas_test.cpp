// Runs that several processes train together: `qlab train --replicas`.
#include "core/replicas.h"

#include <sys/socket.h>

#include <csignal>
#include <map>
#include <thread>

#include "core/parallel.h"
#include "experiments/gradient_sum.h"
#include "experiments/memory_prediction.h"
#include "experiments/replica_processes.h"
#include "experiments/runner.h"
#include "experiments/setup.h"
#include "tests/support/command.h"

namespace qlab::test {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

/// Ranks in threads of this process.
class Ranks {
 public:
  explicit Ranks(int size) {
    std::vector<int> zero;
    for (int rank = 1; rank < size; ++rank) {
      int pair[2];
      if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) fail("no sockets");
      zero.push_back(pair[0]);
      ranks_.push_back(std::make_unique<Replicas>(rank, size, std::vector<int>{pair[1]}));
    }
    ranks_.insert(ranks_.begin(),
                  std::make_unique<Replicas>(0, size, std::move(zero), [](int rank) {
                    return "is gone, number " + std::to_string(rank);
                  }));
  }
  /// What each throws, or "".
  std::vector<std::string> run(const std::function<void(Replicas&)>& body) {
    std::vector<std::string> errors(ranks_.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < ranks_.size(); ++i)
      threads.emplace_back([&, i] {
        try {
          body(*ranks_[i]);
        } catch (const std::exception& error) {
          errors[i] = error.what();
        }
        if (!errors[i].empty()) ranks_[i].reset();  // its sockets close, as a process's do
      });
    for (std::thread& thread : threads) thread.join();
    return errors;
  }

 private:
  std::vector<std::unique_ptr<Replicas>> ranks_;
};

const std::vector<std::string> no_errors = {"", "", ""};

TEST(Replicas, TellAndGather) {
  Ranks ranks(3);
  EXPECT_EQ(ranks.run([](Replicas& r) {
    r.connect(Device::cpu());
    for (const std::string& text : {std::string(), std::string(1 << 20, 'x'), std::string("end")})
      if (r.tell(r.leads() ? text : "nothing") != text) fail("another text");
    for (int i = 0; i < 100; ++i)
      if (r.gather(0.1 * i + r.rank()) != std::vector<double>{0.1 * i, 0.1 * i + 1, 0.1 * i + 2})
        fail("another value");
  }),
            no_errors);
}

// More than fits into what is gathered at once, and a last part of odd length.
TEST(Replicas, GradientsAreAddedInOrder) {
  constexpr int size = 3;
  LoraSpec spec;
  spec.r = 1;
  const std::vector<Adapter::Shape> modules = {{0, "m", 5000003, 7000000}};
  std::vector<std::unique_ptr<Adapter>> adapters;
  std::vector<std::optional<GradientSum>> sums(size);
  for (const int64_t rounds : {1, 2}) {
    adapters.clear();
    for (int r = 0; r < size; ++r) {
      adapters.push_back(std::make_unique<Adapter>(spec, modules, 0, 0, DType::f32, Device::cpu()));
      sums[r].emplace(*adapters[r], size, rounds);
      EXPECT_EQ(sums[r]->total().raw() == adapters[r]->gradients().raw(), rounds == 1);
    }
    const int64_t n = adapters[0]->parameter_count();
    ASSERT_GT(n * size * 4, GradientSum::staging_bytes);
    const auto gradient = [](int64_t micro, int64_t i) {
      return 1.0f / static_cast<float>(1 + micro + i % 1009);
    };
    Ranks ranks(size);
    EXPECT_EQ(ranks.run([&](Replicas& r) {
      float* own = adapters[r.rank()]->gradients().data<float>();
      for (int64_t round = 0; round < rounds; ++round) {
        for (int64_t i = 0; i < n; ++i) own[i] = gradient(round * size + r.rank(), i);
        sums[r.rank()]->add(&r, round == 0 ? size : 1, round == 0);  // two idle in the second
      }
    }),
              no_errors);
    for (const auto& sum : sums) {
      const float* total = sum->total().data<float>();
      int64_t wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        float one_by_one = 0;
        for (int64_t m = 0; m < (rounds == 1 ? 3 : 4); ++m) one_by_one += gradient(m, i);
        wrong += total[i] != one_by_one;
      }
      EXPECT_EQ(wrong, 0) << rounds;
    }
  }
}

TEST(Replicas, AnErrorReachesRankZero) {
  Ranks ranks(3);
  const std::vector<std::string> errors = ranks.run([](Replicas& r) {
    r.gather(1);
    if (r.rank() == 2) {
      r.report("no room for 5 GB");
      fail("ended");
    }
    for (int i = 0; i < 3; ++i) r.gather(2);
  });
  EXPECT_EQ(errors[0], "replica 2 of 3: no room for 5 GB");
  EXPECT_EQ(errors[1], "rank 0 has ended");
}

TEST(Replicas, WhoEndsWithoutAWordIsNamed) {
  Ranks ranks(3);
  const std::vector<std::string> errors = ranks.run([](Replicas& r) {
    r.gather(1);
    if (r.rank() == 1) fail("ended");
    for (int i = 0; i < 100; ++i) r.tell(std::string(1 << 16, 'x'));
    r.gather(2);
  });
  EXPECT_EQ(errors[0], "replica 1 of 3 is gone, number 1");
  EXPECT_EQ(errors[2], "rank 0 has ended");
}

class ReplicasTest : public CommandTest {
 protected:
  using Files = std::map<std::string, std::string>;

  Arguments train(const std::string& out, int replicas, const std::vector<std::string>& sets = {},
                  const std::string& device = "cpu") const {
    Arguments arguments = {"train", run_file(), "--device",   device,
                           "--out", out,        "--replicas", std::to_string(replicas)};
    for (const std::string& set : sets) arguments.insert(arguments.end(), {"--set", set});
    return arguments;
  }
  fs::path trial(const std::string& out) const {
    return fs::directory_iterator(work_ + "/" + out + "/trials")->path();
  }
  /// Adapter and metrics.
  Files results(const std::string& out) const {
    Files files;
    for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors", "eval.json"})
      if (fs::exists(trial(out) / name)) files[name] = read_text_file((trial(out) / name).string());
    return files;
  }
  nlohmann::json status(const std::string& out) const {
    return nlohmann::json::parse(read_text_file((trial(out) / "status.json").string()));
  }
  /// Runs to the end with 0.
  Files finish(const std::string& out, int replicas, const std::vector<std::string>& sets,
               const std::string& device = "cpu") const {
    const Ended ended = run(train(out, replicas, sets, device));
    EXPECT_EQ(ended.code, 0) << ended.out << ended.err;
    EXPECT_EQ(ended.err, "");
    EXPECT_EQ(status(out)["replicas"], replicas);
    return results(out);
  }
  void expect_same(const Files& a, const Files& b) const {
    EXPECT_EQ(a.at("metrics.jsonl"), b.at("metrics.jsonl"));
    EXPECT_TRUE(a == b) << "adapters or evaluations differ";
  }
  bool ended(pid_t pid) const {
    siginfo_t info{};
    waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT);
    return info.si_pid == pid;
  }
  static std::vector<pid_t> children(pid_t pid) {
    std::ifstream file(fmt::format("/proc/{0}/task/{0}/children", pid));
    return {std::istream_iterator<pid_t>(file), {}};
  }
  /// Waits until so many steps have been done, then calls `then`; waits for the end, a minute long.
  Ended at_step(const std::string& out, const Arguments& arguments, int64_t step,
                const std::function<void(pid_t)>& then) const {
    const pid_t pid = start(arguments);
    const auto steps = [&] {
      std::error_code none;
      int64_t lines = 0;
      for (const auto& entry : fs::directory_iterator(work_ + "/" + out + "/trials", none)) {
        std::ifstream file(entry.path() / "metrics.jsonl");
        for (std::string line; std::getline(file, line);)
          lines += line.find("grad_norm") != line.npos;
      }
      return lines;
    };
    const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
    while (steps() < step && !ended(pid)) pause();
    then(pid);
    for (int i = 0; i < 30000 && !ended(pid); ++i) pause();
    EXPECT_TRUE(ended(pid)) << "it hangs";
    kill(pid, SIGKILL);
    return wait(pid);
  }
};

const std::vector<std::string> short_run = {"train.batch_size=3", "train.epochs=1.3",
                                            "train.eval_every=2", "train.save_every=2",
                                            "optim.lr=5e-3"};
std::vector<std::string> with(std::vector<std::string> sets, const std::vector<std::string>& more) {
  sets.insert(sets.end(), more.begin(), more.end());
  return sets;
}

// 26 examples: the last window is short, in some cases by whole micro-batches.
TEST_F(ReplicasTest, ManyGiveTheBitsOfOne) {
  for (const int accumulated : {2, 3, 4}) {
    const std::string accum = std::to_string(accumulated);
    const std::vector<std::string> sets = with(short_run, {"train.grad_accum=" + accum});
    const Files one = finish("1-of-" + accum, 1, sets);
    for (int replicas = 2; replicas <= std::min(accumulated, 3); ++replicas) {
      SCOPED_TRACE(accum + " over " + std::to_string(replicas));
      expect_same(finish(std::to_string(replicas) + "-of-" + accum, replicas, sets), one);
    }
  }
}

TEST_F(ReplicasTest, WhateverTheConfiguration) {
  const std::vector<std::vector<std::string>> variants = {
      {"train.loss_norm=microbatch", "lora.alpha=7"},
      {"quant.compute_dtype=fp16", "optim.type=adamw8bit"},
      {"quant.compute_dtype=bf16", "lora.dtype=bf16", "train.recompute=full"},
      {"optim.type=paged_adamw", "train.recompute=auto"}};
  for (size_t i = 0; i < variants.size(); ++i) {
    SCOPED_TRACE(variants[i][0]);
    const std::vector<std::string> sets =
        with(with(short_run, {"train.grad_accum=3"}), variants[i]);
    expect_same(finish(fmt::format("{}-two", i), 2, sets),
                finish(fmt::format("{}-one", i), 1, sets));
  }
}

// Of 1,000 tokens a micro-batch, and of more than row_unit, whose gradient one replica alone adds
// in two parts: then the numbers are nearly those, and the same for each number above 1.
TEST_F(ReplicasTest, LargeMicroBatches) {
  const std::vector<std::string> sets = {"data.train=synthetic", "data.eval=''",
                                         "data.seq_len=250",     "train.steps=2",
                                         "train.grad_accum=3",   "optim.lr=5e-3"};
  const std::vector<std::string> some = with(sets, {"train.batch_size=4"});
  expect_same(finish("some-2", 2, some), finish("some-1", 1, some));
  const std::vector<std::string> many = with(sets, {"train.batch_size=33"});
  ASSERT_GT(33 * 250, row_unit);
  const Files one = finish("many-1", 1, many), two = finish("many-2", 2, many);
  expect_same(finish("many-3", 3, many), two);
  std::istringstream lines_of_one(one.at("metrics.jsonl")), lines_of_two(two.at("metrics.jsonl"));
  std::string a, b;
  int lines = 0;
  for (; std::getline(lines_of_one, a) && std::getline(lines_of_two, b); ++lines) {
    const auto x = nlohmann::json::parse(a), y = nlohmann::json::parse(b);
    EXPECT_NEAR(x["loss"].get<double>(), y["loss"], 1e-6);
    EXPECT_NEAR(x["grad_norm"].get<double>(), y["grad_norm"], 1e-5 * x["grad_norm"].get<double>());
  }
  EXPECT_EQ(lines, 2);
}

TEST_F(ReplicasTest, ThePredictionIsThePeakToTheByte) {
  QLAB_SKIP_WITHOUT_PLANS();
  set_thread_count(2);  // as commands have it; workspaces grow with threads
  const std::vector<std::vector<std::string>> variants = {
      {}, {"lora.r=256", "train.batch_size=1", "data.seq_len=2"}, {"lora.dtype=bf16"}};
  int number = 0;
  for (const std::vector<std::string>& variant : variants)
    for (const int accumulated : {2, 3}) {
      const std::vector<std::string> sets =
          with({"data.train=synthetic", "data.eval=synthetic", "train.steps=2",
                fmt::format("train.grad_accum={}", accumulated)},
               variant);
      SCOPED_TRACE(testing::PrintToString(sets));
      const std::string out = std::to_string(++number);
      finish(out, 2, sets);
      PaperTrial paper = assumed_trial(load_config(run_file(), sets), Device::cpu());
      const ModelSource model = open_model(paper.config.model.path);
      paper.replicas = 2;
      const MemoryPrediction predicted = predict_memory(model, std::span(&paper, 1), Device::cpu());
      EXPECT_EQ(status(out)["peak_bytes"], predicted.training_peak());
      EXPECT_EQ(status(out)["predicted_peak_bytes"], predicted.training_peak());
    }
  const Ended dry = run({"train", run_file("train: {grad_accum: 2}"), "--device", "cpu",
                         "--replicas", "2", "--dry-run", "--device-memory", "64MB"});
  EXPECT_EQ(dry.code, 0) << dry.err;
  EXPECT_THAT(dry.out, HasSubstr("each of 2 replicas"));
  EXPECT_THAT(dry.out, HasSubstr("with 64.00 MB"));
}

const std::vector<std::string> long_run = {"train.steps=150",     "train.batch_size=2",
                                           "train.grad_accum=3",  "train.save_every=20",
                                           "train.eval_every=40", "optim.lr=5e-3"};

TEST_F(ReplicasTest, StopsAndContinuesWithAnyNumber) {
  const Files whole = finish("whole", 1, long_run);
  int64_t step = 0;
  for (const int replicas : {2, 3, 1}) {
    // Ctrl-C reaches all processes of a terminal.
    const Ended stopped =
        at_step("parts", train("parts", replicas, long_run), step += 25, [&](pid_t pid) {
          for (const pid_t child : children(pid)) kill(child, SIGINT);
          kill(pid, SIGINT);
        });
    EXPECT_EQ(stopped.code, 130) << stopped.out << stopped.err;
    // Said once, by the process that was started.
    EXPECT_EQ(stopped.err,
              "\nqlab: stopping after this step; what was trained is saved (once more stops at "
              "once)\n");
    EXPECT_EQ(status("parts")["status"], "interrupted");
  }
  expect_same(finish("parts", 3, long_run), whole);
}

TEST_F(ReplicasTest, OneThatDiesFailsTheRunAndTheNextContinues) {
  pid_t killed = 0;
  const Ended ended = at_step("out", train("out", 3, long_run), 30, [&](pid_t pid) {
    ASSERT_EQ(children(pid).size(), 2u);
    killed = children(pid)[1];
    kill(killed, SIGKILL);
  });
  EXPECT_EQ(ended.code, 1) << ended.out << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("replica 2 of 3 was ended by signal 9"));
  EXPECT_EQ(status("out")["status"], "failed");
  EXPECT_THAT(status("out")["error"], HasSubstr("replica 2 of 3"));
  EXPECT_NE(kill(killed, 0), 0) << "its process is still there";
  expect_same(finish("out", 2, long_run), finish("whole", 1, long_run));
}

TEST_F(ReplicasTest, NobodyOutlivesRankZero) {
  std::vector<pid_t> others;
  const Ended ended = at_step("out", train("out", 3, long_run), 10, [&](pid_t pid) {
    others = children(pid);
    kill(pid, SIGKILL);
  });
  EXPECT_EQ(ended.code, 128 + SIGKILL);
  EXPECT_EQ(others.size(), 2u);
  for (const pid_t pid : others) {
    // Whoever inherits it may take a moment to reap it.
    const auto alive = [&] {
      std::ifstream file(fmt::format("/proc/{}/stat", pid));
      std::string number, name, state;
      file >> number >> name >> state;
      return file && state != "Z";
    };
    for (int i = 0; i < 1000 && alive(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_FALSE(alive());
  }
}

TEST_F(ReplicasTest, OnlyRankZeroWrites) {
  const std::vector<std::string> sets = with(short_run, {"train.grad_accum=2"});
  const auto files = [&](const std::string& out) {
    std::vector<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(work_ + "/" + out))
      names.push_back(fs::relative(entry.path(), work_ + "/" + out).string());
    std::sort(names.begin(), names.end());
    return names;
  };
  finish("one", 1, sets);
  const Ended two = run(train("two", 2, sets));
  EXPECT_EQ(files("two"), files("one"));
  const auto count = [](const std::string& text, const std::string& part) {
    int found = 0;
    for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++found;
    return found;
  };
  const std::string log = read_text_file((trial("two") / "log.txt").string());
  for (const char* once : {" starts: ", " plan: ", " finished", " step 2: eval loss"})
    EXPECT_EQ(count(log, once), std::string(once) == " plan: " ? 0 : 1) << once << log;
  EXPECT_EQ(count(two.out, "model  "), 1) << two.out;
  EXPECT_THAT(two.out, HasSubstr("on 2 x "));
}

TEST_F(ReplicasTest, Refusals) {
  const auto refused = [&](const std::string& rest, int replicas,
                           const std::vector<std::string>& parts) {
    Arguments arguments = train("out", replicas);
    arguments[1] = run_file(rest);
    expect_refused(arguments, parts);
  };
  refused("train: {batch_size: 8}", 2,
          {"--replicas 2", "train.grad_accum is 1", "one micro-batch", "train.grad_accum to 2",
           "train.batch_size to 4"});
  refused("train: {batch_size: 3, grad_accum: 2}", 4, {"train.grad_accum to 4 or more"});
  refused("train: {grad_accum: 2}", 0, {"--replicas"});
  Arguments sweep = train("out", 2);
  sweep[0] = "sweep";
  expect_refused(sweep, {"--replicas", "--shard"});
  if (cuda::device_count() == 0) return;
  Arguments many = train("out", 64, {"train.grad_accum=64"}, "cuda");
  expect_refused(many, {"--replicas 64", "GPU"});
}

TEST(Replicas, WhatIsInTheEnvironmentByMistakeIsAnError) {
  EXPECT_EQ(join_replicas(), nullptr);
  setenv("QLAB_REPLICA", "1/2/-1", 1);
  EXPECT_ERROR(join_replicas(), "QLAB_REPLICA=1/2/-1 is in the environment");
  EXPECT_EQ(std::getenv("QLAB_REPLICA"), nullptr);
}

// Sockets must not take the place of streams, into which rank 0 prints.
TEST_F(ReplicasTest, StartedWithClosedStreams) {
  const std::vector<std::string> sets = with(short_run, {"train.grad_accum=3"});
  std::string command = "cd '" + work_ + "' && OMP_NUM_THREADS=2 exec '" + program() + "'";
  for (const std::string& word : train("closed", 3, sets)) command += " '" + word + "'";
  EXPECT_EQ(std::system(("(" + command + ") <&- >&- 2>&-").c_str()), 0);
  expect_same(results("closed"), finish("open", 1, sets));
}

// A file that is replaced while a run starts.
TEST_F(ReplicasTest, OtherDataThanRankZeroIsAnError) {
  const Config config = load_config(run_file("train: {grad_accum: 2}"), {});
  Ranks ranks(2);
  const std::vector<std::string> errors = ranks.run([&](Replicas& r) {
    if (!r.leads()) return assist(r, config, Device::cpu(), false);
    r.tell(work_ + "/trial");
    r.tell("other contents");
  });
  EXPECT_EQ(errors[0], "");
  EXPECT_THAT(errors[1], HasSubstr("a file was changed"));
}

TEST_F(ReplicasTest, SaysWhereSomeAreIdle) {
  const Ended ended = run(train("out", 2, with(short_run, {"train.grad_accum=3"})));
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("of 2 replicas 1 has nothing to do in the last round"));
}

// On GPUs, in 16 bits, by recorded graphs too.
class CudaReplicasTest : public ReplicasTest {};
TEST_F(CudaReplicasTest, LargeTwoGpusGiveTheBitsOfOne) {
  if (cuda::device_count() < 2) GTEST_SKIP() << "needs two GPUs";
  if (const std::string why = cuda::why_no_nccl(); !why.empty()) GTEST_SKIP() << why;
  const std::vector<std::vector<std::string>> variants = {
      {"train.grad_accum=2"},
      {"train.grad_accum=3", "lora.alpha=7"},
      {"train.grad_accum=4", "train.recompute=full", "optim.type=adamw8bit"},
      {"train.grad_accum=2", "data.train=synthetic", "train.steps=12", "data.seq_len=200"},
      {"train.grad_accum=2", "quant.compute_dtype=fp16"},
      {"train.grad_accum=2", "lora.r=64", "lora.dropout=0"}};
  for (size_t i = 0; i < variants.size(); ++i) {
    SCOPED_TRACE(testing::PrintToString(variants[i]));
    std::vector<std::string> sets = {"train.batch_size=3", "train.eval_every=2", "optim.lr=5e-3"};
    if (i != 3) sets.emplace_back("train.epochs=1.3");
    sets = with(sets, variants[i]);
    const Files one = finish(fmt::format("{}-one", i), 1, sets, "cuda");
    expect_same(finish(fmt::format("{}-two", i), 2, sets, "cuda"), one);
    const auto two = status(fmt::format("{}-two", i));
    EXPECT_EQ(two["peak_bytes"], two["predicted_peak_bytes"]);
  }
}

// One replica that is killed while the others wait for it.
TEST_F(CudaReplicasTest, LargeOneThatDiesFailsTheRun) {
  if (cuda::device_count() < 2) GTEST_SKIP() << "needs two GPUs";
  if (const std::string why = cuda::why_no_nccl(); !why.empty()) GTEST_SKIP() << why;
  std::vector<std::string> sets = long_run;
  sets[0] = "train.steps=100000";
  const Ended ended = at_step("out", train("out", 2, sets, "cuda"), 20, [&](pid_t pid) {
    ASSERT_EQ(children(pid).size(), 1u);
    kill(children(pid)[0], SIGKILL);
  });
  EXPECT_THAT(ended.code, testing::AnyOf(1, 2)) << ended.out << ended.err;
  EXPECT_THAT(ended.out + ended.err, HasSubstr("replica 1 of 2 was ended by signal 9"));
}

}  // namespace
}  // namespace qlab::test
