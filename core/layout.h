// Where the blocks of a step lie that is planned ahead.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

namespace qlab {

/// Blocks with lifetimes, each laid out in the tightest gap that those before it leave. Most live
/// for a few events among many thousands, so they are found by windows of events; one that lives
/// for many windows asks each, or each group of them, for nothing but the bytes that are not free,
/// or all blocks where those are fewer.
class Layout {
 public:
  explicit Layout(int32_t events)
      : windows_(static_cast<size_t>(events / window + 1)), groups_(windows_.size() / group + 1) {}

  int64_t place(int64_t bytes, int32_t taken, int32_t given) {
    const auto first = static_cast<size_t>(taken / window);
    const auto last = static_cast<size_t>(given / window);
    Span own{0, 0, taken, given};
    own.offset = gap(own, bytes, first, last);
    own.end = own.offset + bytes;
    bytes_ = std::max(bytes_, own.end);
    for (size_t w = first; w <= last; ++w) {
      insert(windows_[w].spans, own);
      cover(windows_[w].covered, own);
    }
    for (size_t g = first / group; g <= last / group; ++g) cover(groups_[g], own);
    all_.emplace(own.offset, own);
    return own.offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int32_t window = 128;
  static constexpr size_t group = 64;   // windows
  static constexpr size_t sorting = 8;  // times what a range costs that is there in order
  struct Span {
    int64_t offset, end;
    int32_t taken, given;
  };
  struct Range {
    int64_t offset, end;
  };
  struct Window {
    std::vector<Span> spans;  // that live in it, by offset
    std::vector<Range> covered;
  };
  static bool below(const Span& a, const Span& b) { return a.offset < b.offset; }
  static void insert(std::vector<Span>& spans, const Span& own) {
    spans.insert(std::upper_bound(spans.begin(), spans.end(), own, below), own);
  }
  /// Apart from each other, by offset.
  static void cover(std::vector<Range>& ranges, const Span& own) {
    const auto first =
        std::lower_bound(ranges.begin(), ranges.end(), own.offset,
                         [](const Range& r, int64_t offset) { return r.end < offset; });
    Range all{own.offset, own.end};
    auto last = first;
    for (; last != ranges.end() && last->offset <= own.end; ++last)
      all = {std::min(all.offset, last->offset), std::max(all.end, last->end)};
    if (first == last) {
      ranges.insert(first, all);
    } else {
      *first = all;
      ranges.erase(first + 1, last);
    }
  }

  int64_t gap(const Span& own, int64_t bytes, size_t first, size_t last) {
    int64_t at = 0, best = -1, tightest = std::numeric_limits<int64_t>::max();
    const auto see = [&](const Span& other) {
      if (other.given < own.taken || own.given < other.taken) return;
      if (const int64_t gap = other.offset - at; gap >= bytes && gap < tightest)
        best = at, tightest = gap;
      at = std::max(at, other.end);
    };
    const std::vector<Span>&a = windows_[first].spans, &b = windows_[last].spans;
    if (first == last) {
      for (const Span& other : a) see(other);
    } else if (first + 1 == last) {  // a span in both is seen twice, which changes nothing
      merged_.resize(a.size() + b.size());
      std::merge(a.begin(), a.end(), b.begin(), b.end(), merged_.begin(), below);
      for (const Span& other : merged_) see(other);
    } else {
      const auto between = [&](auto&& ranges) {
        for (size_t w = first + 1; w < last;) {
          const bool whole = w % group == 0 && w + group <= last;
          ranges(whole ? groups_[w / group] : windows_[w].covered);
          w += whole ? group : 1;
        }
      };
      size_t count = a.size() + b.size();
      between([&](const std::vector<Range>& ranges) { count += ranges.size(); });
      if (count > all_.size() / sorting) {
        for (const auto& [offset, other] : all_) see(other);
        return best < 0 ? at : best;
      }
      merged_.assign(a.begin(), a.end());
      merged_.insert(merged_.end(), b.begin(), b.end());
      between([&](const std::vector<Range>& ranges) {
        for (const Range& r : ranges) merged_.push_back({r.offset, r.end, own.taken, own.given});
      });
      std::sort(merged_.begin(), merged_.end(), below);
      for (const Span& other : merged_) see(other);
    }
    return best < 0 ? at : best;
  }

  std::vector<Window> windows_;
  std::vector<std::vector<Range>> groups_;  // covered in any window of each
  std::multimap<int64_t, Span> all_;
  std::vector<Span> merged_;
  int64_t bytes_ = 0;
};

}  // namespace qlab
