#include "experiments/terminal.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>

namespace qlab {
namespace {

volatile std::sig_atomic_t interrupt_flag = 0;

void on_signal(int number) {
  if (interrupt_flag) std::signal(number, SIG_DFL), std::raise(number);
  interrupt_flag = 1;
}

std::string duration(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

}  // namespace

Terminal::Terminal() : live_(isatty(STDOUT_FILENO)) {}

void Terminal::print(const std::string& line) {
  if (open_) std::fputs("\n", stdout), open_ = false;
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);
}

void Terminal::progress(const TrainProgress& p) {
  const auto now = std::chrono::steady_clock::now();
  // Without a terminal a line now and then is enough to see that it goes on.
  constexpr auto quiet = std::chrono::seconds(10);
  if (!live_ && !p.last && current_ == p.name && now - last_ < quiet) return;
  last_ = now;
  const std::string text =
      fmt::format("{}  step {}/{}  loss {:.4f}  {:.0f} tokens/s  {} left", p.name, p.step,
                  p.total_steps, p.loss, p.tokens_per_s, duration(p.seconds_left));
  if (!live_) {
    current_ = p.name;
    return print(text);
  }
  if (open_ && current_ != p.name) std::fputs("\n", stdout);
  std::fputs(("\r\x1b[K" + text).c_str(), stdout);
  open_ = !p.last;
  if (p.last) std::fputs("\n", stdout);
  current_ = p.name;
  std::fflush(stdout);
}

TrainCallbacks Terminal::callbacks() {
  return {[this](const TrainProgress& p) { progress(p); },
          [this](const std::string& line) { print(line); }, interrupted};
}

void catch_interrupts() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}
bool interrupted() { return interrupt_flag != 0; }

}  // namespace qlab
