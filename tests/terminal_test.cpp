// What a terminal shows while runs go on: a pseudo-terminal, and a screen that follows its codes.
#include "experiments/terminal.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "tests/support/files.h"

namespace qlab::test {
namespace {

constexpr unsigned short kRows = 24, kColumns = 80;

/// Follows the few codes that are used; what leaves it at the top is kept.
class Screen {
 public:
  void write(const std::string& text) {
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '\x1b') {
        size_t end = i + 2;
        while (std::isdigit(static_cast<unsigned char>(text.at(end)))) ++end;
        control(text[end], text.substr(i + 2, end - i - 2));
        i = end;
      } else if (text[i] == '\r') {
        column_ = 0;
      } else if (text[i] == '\n') {
        down();
      } else {
        if (column_ == kColumns) column_ = 0, down();
        rows_[row_].resize(std::max(rows_[row_].size(), column_ + 1), ' ');
        rows_[row_][column_++] = text[i];
      }
    }
  }
  /// Everything that was ever shown and not overwritten, the rows joined.
  std::string all() const {
    std::string text;
    for (const std::string& row : gone_) text += row;
    for (const std::string& row : rows_) text += row;
    return text;
  }
  size_t scrolled() const { return gone_.size(); }

 private:
  void down() {
    if (++row_ < kRows) return;
    row_ = kRows - 1;
    gone_.push_back(rows_.front());
    rows_.erase(rows_.begin());
    rows_.emplace_back();
  }
  void control(char code, const std::string& count) {
    if (code == 'A') {
      const auto up = static_cast<size_t>(std::stoi(count));
      row_ -= std::min(up, row_);
    } else {
      ASSERT_TRUE(code == 'J' || code == 'K') << code;
      rows_[row_].resize(std::min(rows_[row_].size(), column_));
      for (size_t r = row_ + 1; code == 'J' && r < kRows; ++r) rows_[r].clear();
    }
  }
  std::vector<std::string> gone_, rows_ = std::vector<std::string>(kRows);
  size_t row_ = 0, column_ = 0;
};

class TerminalTest : public testing::Test {
 protected:
  void SetUp() override {
    outside_ = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
    ASSERT_GE(outside_, 0);
    ASSERT_EQ(grantpt(outside_) | unlockpt(outside_), 0);
    const int inside = open(ptsname(outside_), O_RDWR | O_NOCTTY);
    ASSERT_GE(inside, 0);
    const winsize size{kRows, kColumns, 0, 0};
    ASSERT_EQ(ioctl(inside, TIOCSWINSZ, &size), 0);
    std::fflush(stdout);
    stdout_ = dup(STDOUT_FILENO);
    dup2(inside, STDOUT_FILENO);
    close(inside);
    terminal_.emplace();
  }
  void TearDown() override {
    if (stdout_ < 0) return;
    dup2(stdout_, STDOUT_FILENO);
    close(stdout_);
    close(outside_);
  }
  void step(const std::string& name, int64_t step) {
    terminal_->progress({name, step, 4, 1.25, 100, 3, 0, step == 4, {}});
    read_screen();
  }
  void evaluate(const std::string& name, size_t done, bool last) {
    terminal_->evaluating({name, false, done, 5, last});
    read_screen();
  }
  void read_screen() {
    char bytes[4096];
    for (ssize_t count; (count = read(outside_, bytes, sizeof(bytes))) > 0;)
      screen_.write({bytes, static_cast<size_t>(count)});
  }
  int count(const std::string& part) const {
    const std::string text = screen_.all();
    int found = 0;
    for (size_t at = 0; (at = text.find(part, at)) != text.npos; at += part.size()) ++found;
    return found;
  }

  std::optional<Terminal> terminal_;
  Screen screen_;
  int outside_ = -1, stdout_ = -1;
};

TEST_F(TerminalTest, OneLiveLinePerRunningTrial) {
  const std::string end = std::string(53, 'x') + "-s";
  for (int trial = 10; trial < 50; ++trial) {
    const std::string name = "r" + std::to_string(trial) + end + std::to_string(trial);
    for (int n = 1; n <= 4; ++n) step(name, n);
    EXPECT_EQ(count("step 1/4") + count("step 2/4") + count("step 3/4"), 0);
    for (const size_t done : {0u, 3u, 5u}) evaluate(name, done, done == 5);
  }
  EXPECT_EQ(count("step 4/4"), 40);
  EXPECT_EQ(count("evaluating"), 0);
  EXPECT_EQ(count("r10" + end + "10  step 4/4"), 1) << screen_.all();  // in full once it lasts
}

TEST_F(TerminalTest, SaysWhatAnUpdateMoved) {
  PageTraffic traffic;
  traffic.bytes = 58'980'000, traffic.stalled_seconds = 0.0012;
  terminal_->progress({"r8", 1, 4, 1.25, 100, 3, 0, false, traffic});
  read_screen();
  EXPECT_EQ(count("58.98 MB moved, 1.2 ms stalled"), 1) << screen_.all();
}

TEST_F(TerminalTest, LongNamesGiveWayToTheFigures) {
  for (int n = 1; n <= 3; ++n) {
    step("r8-" + std::string(50, 'x') + "-s0", n);
    step("r8-" + std::string(50, 'x') + "-s1", n);
  }
  EXPECT_EQ(count("step 1/4") + count("step 2/4"), 0) << screen_.all();
  EXPECT_EQ(count("step 3/4  loss 1.2500  100 tokens/s  0:03 left"), 2) << screen_.all();
  EXPECT_EQ(count("-s0  step"), 1);
  EXPECT_EQ(count("-s1  step"), 1);
  EXPECT_EQ(count("r8-"), 2);
}

TEST_F(TerminalTest, MoreRunsThanRowsDoNotScroll) {
  for (int n = 1; n <= 3; ++n)
    for (int trial = 0; trial < 30; ++trial) step("trial" + std::to_string(trial), n);
  EXPECT_EQ(screen_.scrolled(), 0u);
  EXPECT_EQ(count("step 3/4"), 22);
  EXPECT_EQ(count("and 8 more"), 1);
  for (int trial = 0; trial < 30; ++trial) step("trial" + std::to_string(trial), 4);
  EXPECT_EQ(count("step 4/4"), 30);
  EXPECT_EQ(count("more"), 0);
}

}  // namespace
}  // namespace qlab::test
