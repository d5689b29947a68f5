// Where the blocks of a step lie that is planned ahead.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

namespace qlab {

/// Blocks with lifetimes, each laid out in the tightest gap that those before it leave. Most live
/// for a few events among many thousands, so they are found by windows of events.
class Layout {
 public:
  explicit Layout(int32_t events) : windows_(static_cast<size_t>(events / window + 1)) {}

  int64_t place(int64_t bytes, int32_t taken, int32_t given) {
    const auto first = static_cast<size_t>(taken / window);
    const auto last = static_cast<size_t>(given / window);
    Span own{0, 0, taken, given};
    own.offset = gap(own, bytes, first, last);
    own.end = own.offset + bytes;
    bytes_ = std::max(bytes_, own.end);
    for (size_t w = first; w <= last; ++w) insert(windows_[w], own);
    all_.emplace(own.offset, own);
    return own.offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int32_t window = 128;
  struct Span {
    int64_t offset, end;
    int32_t taken, given;
  };
  static bool below(const Span& a, const Span& b) { return a.offset < b.offset; }
  static void insert(std::vector<Span>& spans, const Span& own) {
    spans.insert(std::upper_bound(spans.begin(), spans.end(), own, below), own);
  }

  int64_t gap(const Span& own, int64_t bytes, size_t first, size_t last) {
    int64_t at = 0, best = -1, tightest = std::numeric_limits<int64_t>::max();
    const auto see = [&](const Span& other) {
      if (other.given < own.taken || own.given < other.taken) return;
      if (const int64_t gap = other.offset - at; gap >= bytes && gap < tightest)
        best = at, tightest = gap;
      at = std::max(at, other.end);
    };
    const std::vector<Span>&a = windows_[first], &b = windows_[last];
    if (first == last) {
      for (const Span& other : a) see(other);
    } else if (first + 1 == last) {  // a span in both is seen twice, which changes nothing
      merged_.resize(a.size() + b.size());
      std::merge(a.begin(), a.end(), b.begin(), b.end(), merged_.begin(), below);
      for (const Span& other : merged_) see(other);
    } else {
      for (const auto& [offset, other] : all_) see(other);
    }
    return best < 0 ? at : best;
  }

  std::vector<std::vector<Span>> windows_;  // spans that live in each, by offset
  std::multimap<int64_t, Span> all_;
  std::vector<Span> merged_;
  int64_t bytes_ = 0;
};

}  // namespace qlab
