// The two moments of an optimizer, in pages. While there is room every page lies on the device;
// when an allocation there does not fit, pages move to the host (page-locked for a GPU) and stay
// there. An update brings each of them into memory that is idle then, and back:
//
//   copies in      1 2 3 4 . 5 . 6 ...      a slot is filled again once it was written back
//   updates        resident pages  1 2 3 4 5 6
//   copies out                       1 2 3 4 5 6
//
// Where pages lie depends on the bytes allocated alone, on meta as on the device; no result does.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace qlab {

/// What one update moved over the bus, and how long the updates waited for it.
struct PageTraffic {
  int64_t bytes = 0;  // in and out
  double stalled_seconds = 0;
};

class Moments final : private Evictable {
 public:
  static constexpr int64_t block_size = 256;
  /// Two times `blocks` of 256 elements, zero. `paged`: pages may leave the device. Otherwise all
  /// is one page.
  Moments(int64_t blocks, DType dtype, bool paged, Device device);
  ~Moments();
  Moments(const Moments&) = delete;
  Moments& operator=(const Moments&) = delete;

  /// Blocks [first, last): m and v of 256 (last - first) elements each, on the device.
  using Update = std::function<void(int64_t first, int64_t last, const Tensor& m, const Tensor& v)>;
  /// Shows every page once. `idle`: memory of the device that nobody uses until whatever is issued
  /// next; undefined or too small for two pages, some is allocated.
  void visit(const Tensor& idle, const Update& update);
  /// Of the last visit; waits for it.
  PageTraffic traffic() const;

  /// The first n elements of m (0) or v (1): a view of the device's, or a copy on the host where
  /// there are pages.
  Tensor read(int which, int64_t n) const;
  /// From a tensor on the host.
  void write(int which, const Tensor& values);

  int64_t bytes() const { return bytes_of(blocks_); }
  int64_t bytes_on_host() const;

 private:
  struct Transfer;
  struct Page {
    int64_t first, last;
    Tensor device;               // [2, 256 (last - first)], or undefined
    std::shared_ptr<void> host;  // the same bytes; null on the device, and on meta
    std::unique_ptr<Transfer> transfer;
  };
  int64_t evict(int64_t bytes) override;
  Tensor zeros(const Page& page) const;
  int64_t bytes_of(int64_t blocks) const;
  Tensor shape_at(const Tensor& memory, int64_t offset, const Page& page) const;
  void show(const Page& page, const Tensor& states, const Update& update) const;
  void leave(Page& page);
  void visit_host_pages(const std::vector<Page*>& pages, const Tensor& slots, int64_t depth,
                        const Update& update, const std::function<void()>& residents);
  void visit_pinned_pages(const std::vector<Page*>& pages, const Tensor& slots, int64_t depth,
                          const Update& update, const std::function<void()>& residents);

  int64_t blocks_;
  DType dtype_;
  bool paged_;
  Device device_;
  int64_t page_blocks_;
  std::vector<Page> pages_;
  std::unique_ptr<cuda::CopyStream> in_, out_;
  std::unique_ptr<cuda::Event> start_, residents_done_;
  std::vector<const Page*> moved_;  // in the last visit
  PageTraffic traffic_;
};

}  // namespace qlab
