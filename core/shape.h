// Dimensions of a tensor; a class of its own so that messages and lookups find it.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/error.h"

namespace qlab {

class Shape {
 public:
  static constexpr int max_rank = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    for (int64_t d : dims) push_back(d);
  }

  void push_back(int64_t d) {
    QLAB_CHECK(rank_ < max_rank, "a tensor has at most {} dimensions", max_rank);
    QLAB_CHECK(d >= 0, "a dimension must not be negative, got {}", d);
    dims_[rank_++] = d;
  }
  int rank() const { return rank_; }
  /// Negative indices count from the end.
  int64_t operator[](int i) const { return dims_[i < 0 ? i + rank_ : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[i];
    return n;
  }
  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; ++i)
      if (dims_[i] != other.dims_[i]) return false;
    return true;
  }
  std::string str() const {
    std::string s = "[";
    for (int i = 0; i < rank_; ++i) s += (i ? ", " : "") + std::to_string(dims_[i]);
    return s + "]";
  }

 private:
  std::array<int64_t, max_rank> dims_{};
  int rank_ = 0;
};

}  // namespace qlab

template <>
struct fmt::formatter<qlab::Shape> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }
  template <class Context>
  auto format(const qlab::Shape& shape, Context& context) const {
    return fmt::format_to(context.out(), "{}", shape.str());
  }
};
