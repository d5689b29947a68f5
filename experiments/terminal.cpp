#include "experiments/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>

#include "data/file.h"

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

void write_out(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
    fail("the standard output cannot be written to{}", disk_remedy(errno));
}

Terminal::Terminal() : live_(isatty(STDOUT_FILENO)) {}

void Terminal::print(const std::string& line) {
  lines_.clear();
  drawn_ = 0;
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);
}

void Terminal::show(const std::string& name, const std::string& text, bool last) {
  const auto now = std::chrono::steady_clock::now();
  auto line =
      std::find_if(lines_.begin(), lines_.end(), [&](const Line& l) { return l.name == name; });
  const bool first = line == lines_.end();
  if (first) line = lines_.insert(lines_.end(), {name, "", {}});
  line->text = name + "  " + text;
  if (!live_) {
    // Without a terminal a line now and then is enough to see that it goes on.
    constexpr auto quiet = std::chrono::seconds(20);
    if (!first && !last && now - line->printed < quiet) return;
    line->printed = now;
    std::fputs((line->text + "\n").c_str(), stdout);
  } else {
    std::string screen = drawn_ > 0 ? fmt::format("\x1b[{}A", drawn_) : "";
    for (const Line& l : lines_) screen += "\r\x1b[K" + l.text + "\n";
    drawn_ = lines_.size();
    std::fputs(screen.c_str(), stdout);
  }
  std::fflush(stdout);
}

void Terminal::progress(const TrainProgress& p) {
  show(p.name,
       fmt::format("step {}/{}  loss {:.4f}  {:.0f} tokens/s{}{}  {} left", p.step, p.total_steps,
                   p.loss, p.tokens_per_s,
                   p.mfu > 0 ? fmt::format("  {:.0f} % MFU", 100 * p.mfu) : "",
                   p.traffic.bytes > 0
                       ? fmt::format("  {} paged, {:.1f} ms stalled", format_bytes(p.traffic.bytes),
                                     1e3 * p.traffic.stalled_seconds)
                       : "",
                   duration(p.seconds_left)),
       p.last);
}

void Terminal::evaluating(const EvaluationProgress& p) {
  show(p.base ? "base" : p.name, fmt::format("evaluating: {} of {} examples", p.done, p.examples),
       false);
}

TrainCallbacks Terminal::callbacks() {
  TrainCallbacks callbacks;
  callbacks.progress = [this](const TrainProgress& p) { progress(p); };
  callbacks.evaluating = [this](const EvaluationProgress& p) { evaluating(p); };
  callbacks.stop = interrupted;
  return callbacks;
}

void catch_interrupts() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}
bool interrupted() { return interrupt_flag != 0; }

}  // namespace qlab
