#include "experiments/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "data/file.h"

namespace qlab {
namespace {

volatile std::sig_atomic_t interrupt_flag = 0;

bool saves_at_interrupt = false;

/// What may be called where a signal came in.
void tell(const char* text) {
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text, std::strlen(text));
}

void on_signal(int number) {
  if (interrupt_flag) std::signal(number, SIG_DFL), std::raise(number);
  interrupt_flag = 1;
  if (saves_at_interrupt)
    tell("\nqlab: stopping after this step; what was trained is saved (once more stops at once)\n");
}

std::string duration(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

struct Window {
  size_t rows, columns;
};

/// Of the terminal, at least large enough to show something.
Window window() {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0)
    return {24, 80};
  return {std::max<size_t>(size.ws_row, 3), std::max<size_t>(size.ws_col, 2)};
}

/// A long name gives way to the figures: its middle, since names differ at their ends.
std::string one_row(std::string name, const std::string& text, size_t columns) {
  constexpr size_t shortest_name = 9, gap = 2;
  const size_t room = columns > text.size() + gap ? columns - text.size() - gap : 0;
  if (const size_t keep = std::max(room, shortest_name); name.size() > keep) {
    const size_t head = (keep - 2) / 2, tail = keep - 2 - head;
    name = name.substr(0, head) + ".." + name.substr(name.size() - tail);
  }
  return (name + "  " + text).substr(0, columns);
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

void Terminal::show(const std::string& name, const std::string& text, Kind kind) {
  const auto now = std::chrono::steady_clock::now();
  auto line =
      std::find_if(lines_.begin(), lines_.end(), [&](const Line& l) { return l.name == name; });
  const bool first = line == lines_.end();
  if (first) line = lines_.insert(lines_.end(), {name, "", {}});
  line->text = text;
  if (live_) {
    const std::string above = kind == Kind::lasting ? name + "  " + text + "\n" : "";
    if (kind != Kind::live) lines_.erase(line);
    return draw(above);
  }
  // Without a terminal a line now and then is enough to see that it goes on.
  constexpr auto quiet = std::chrono::seconds(20);
  if (!first && kind != Kind::lasting && now - line->printed < quiet) return;
  line->printed = now;
  std::fputs((name + "  " + text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

// One row per line, or the cursor would not find back.
void Terminal::draw(const std::string& above) {
  const auto [rows, columns] = window();
  std::string screen = (drawn_ > 0 ? fmt::format("\x1b[{}A", drawn_) : "") + "\r\x1b[J" + above;
  const size_t fit = lines_.size() < rows ? lines_.size() : rows - 2;
  for (size_t i = 0; i < fit; ++i)
    screen += one_row(lines_[i].name, lines_[i].text, columns - 1) + "\n";
  if (fit < lines_.size()) screen += fmt::format("and {} more\n", lines_.size() - fit);
  drawn_ = std::min(lines_.size(), fit + 1);
  std::fputs(screen.c_str(), stdout);
  std::fflush(stdout);
}

void Terminal::progress(const TrainProgress& p) {
  show(p.name,
       fmt::format("step {}/{}  loss {:.4f}  {:.0f} tokens/s{}{}  {} left", p.step, p.total_steps,
                   p.loss, p.tokens_per_s,
                   p.mfu > 0 ? fmt::format("  {:.0f} % MFU", 100 * p.mfu) : "",
                   p.traffic.bytes > 0
                       ? fmt::format("  {} moved, {:.1f} ms stalled", format_bytes(p.traffic.bytes),
                                     1e3 * p.traffic.stalled_seconds)
                       : "",
                   duration(p.seconds_left)),
       p.last ? Kind::lasting : Kind::live);
}

void Terminal::evaluating(const EvaluationProgress& p) {
  show(p.base ? "base" : p.name, fmt::format("evaluating: {} of {} examples", p.done, p.examples),
       p.last ? Kind::gone : Kind::live);
}

TrainCallbacks Terminal::callbacks() {
  TrainCallbacks callbacks;
  callbacks.progress = [this](const TrainProgress& p) { progress(p); };
  callbacks.evaluating = [this](const EvaluationProgress& p) { evaluating(p); };
  callbacks.stop = interrupted;
  return callbacks;
}

void catch_interrupts(bool saves) {
  saves_at_interrupt = saves;
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}
bool interrupted() { return interrupt_flag != 0; }

}  // namespace qlab
