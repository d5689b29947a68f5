// Runs the qlab command in an empty directory.
#pragma once
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "tests/support/training.h"

namespace qlab::test {

struct Ended {
  int code;  // 128 + signal when killed
  std::string out, err;
};

class CommandTest : public testing::Test {
 protected:
  using Arguments = std::vector<std::string>;

  /// Beside this program, where the build puts it.
  static std::string program() {
    return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "qlab").string();
  }
  void SetUp() override {
    if (!std::filesystem::exists(program())) GTEST_SKIP() << program() << " has not been built";
    std::filesystem::create_directory(work_);
  }

  /// Starts qlab in an empty directory, where no model is cached.
  pid_t start(const Arguments& arguments) const {
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    const int write_new = O_WRONLY | O_CREAT | O_TRUNC;
    posix_spawn_file_actions_addopen(&actions, 1, (folder_ / "stdout").c_str(), write_new, 0600);
    posix_spawn_file_actions_addopen(&actions, 2, (folder_ / "stderr").c_str(), write_new, 0600);
    posix_spawn_file_actions_addchdir_np(&actions, work_.c_str());
    std::vector<std::string> words = {program()},
                             environment = {"HF_HOME=" + folder_ / "cache", "OMP_NUM_THREADS=2",
                                            std::string("PATH=") + std::getenv("PATH")};
    words.insert(words.end(), arguments.begin(), arguments.end());
    const auto pointers = [](std::vector<std::string>& texts) {
      std::vector<char*> result;
      for (std::string& text : texts) result.push_back(text.data());
      result.push_back(nullptr);
      return result;
    };
    pid_t pid = 0;
    const int error = posix_spawn(&pid, program().c_str(), &actions, nullptr,
                                  pointers(words).data(), pointers(environment).data());
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0) fail("cannot start {}", program());
    return pid;
  }
  Ended wait(pid_t pid) const {
    int status = 0;
    waitpid(pid, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
            read_text_file(folder_ / "stdout"), read_text_file(folder_ / "stderr")};
  }
  Ended run(const Arguments& arguments) const { return wait(start(arguments)); }

  /// One message that holds all `parts`, code 2, and no new file.
  void expect_refused(const Arguments& arguments, const std::vector<std::string>& parts) const {
    SCOPED_TRACE(testing::PrintToString(arguments));
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 2) << ended.out << ended.err;
    EXPECT_THAT(ended.err, testing::StartsWith("qlab: "));
    EXPECT_LE(std::count(ended.err.begin(), ended.err.end(), '\n'), 4) << ended.err;
    for (const std::string& part : parts) EXPECT_THAT(ended.err, testing::HasSubstr(part));
    EXPECT_TRUE(std::filesystem::is_empty(work_)) << "something was written";
  }
  /// A run file that is right, but for `rest`.
  std::string run_file(const std::string& rest = "") const {
    return folder_.write(
        "run.yaml", "model: {path: \"synthetic:tiny\"}\ndata: {train: " + train_ +
                        ", eval: " + eval_ +
                        ", seq_len: 64, eval_seq_len: 64}\nlora: {r: 4, dropout: 0.1}\n" + rest);
  }
  void expect_refused_run(const std::string& rest, const std::vector<std::string>& parts) const {
    SCOPED_TRACE(rest);
    expect_refused({"train", run_file(rest), "--device", "cpu"}, parts);
  }

  TemporaryFolder folder_;
  const std::string work_ = folder_ / "work";
  const std::string train_ = folder_.write("train.jsonl", examples(20, 1));
  const std::string eval_ = folder_.write("eval.jsonl", examples(5, 2));
};

}  // namespace qlab::test
