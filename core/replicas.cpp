#include "core/replicas.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace qlab {
namespace {

/// Ends with an error too: a rank that reports one waits for nobody.
class Wait {
 public:
  explicit Wait(std::atomic<bool>& waits) : waits_(waits) { waits_ = true; }
  ~Wait() { waits_ = false; }
  Wait(const Wait&) = delete;
  Wait& operator=(const Wait&) = delete;

 private:
  std::atomic<bool>& waits_;
};

}  // namespace

Replicas::Replicas(int rank, int size, std::vector<int> sockets,
                   std::function<std::string(int rank)> why_gone)
    : rank_(rank), size_(size), sockets_(std::move(sockets)), why_gone_(std::move(why_gone)) {
  QLAB_CHECK(std::ssize(sockets_) == (leads() ? size - 1 : 1), "{} sockets for rank {} of {}",
             sockets_.size(), rank, size);
}

Replicas::~Replicas() {
  for (const int socket : sockets_) close(socket);
}

int Replicas::socket_to(int peer) const {
  return sockets_[leads() ? static_cast<size_t>(peer - 1) : 0];
}

void Replicas::send_all(int peer, const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = ::send(socket_to(peer), at, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) throw_gone(peer);
    at += sent, bytes -= static_cast<size_t>(sent);
  }
}

void Replicas::receive_all(int peer, void* data, size_t bytes) {
  char* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t came = recv(socket_to(peer), at, bytes, 0);
    if (came < 0 && errno == EINTR) continue;
    if (came <= 0) {
      if (!leads()) throw RankZeroGone("rank 0 has ended");
      fail("replica {} of {} {}", peer, size_, why_gone_ ? why_gone_(peer) : "has ended");
    }
    at += came, bytes -= static_cast<size_t>(came);
  }
}

void Replicas::send(int peer, Kind kind, const void* data, size_t bytes) {
  const Head head{kind, bytes};
  send_all(peer, &head, sizeof head);
  send_all(peer, data, bytes);
}

Replicas::Head Replicas::receive_head(int peer) {
  Head head{};
  receive_all(peer, &head, sizeof head);
  if (head.kind == Kind::data) return head;
  std::string error(head.bytes, ' ');
  receive_all(peer, error.data(), error.size());
  fail("replica {} of {}: {}", peer, size_, error);
}

void Replicas::receive(int peer, void* data, size_t bytes) {
  const Head head = receive_head(peer);
  QLAB_CHECK(head.bytes == bytes, "rank {} got {} bytes of rank {} in place of {}", rank_,
             head.bytes, peer, bytes);
  receive_all(peer, data, bytes);
}

void Replicas::throw_gone(int peer) {
  // What it sent before it ended is still there, at last perhaps why.
  while (true) {
    std::string passed_over(receive_head(peer).bytes, ' ');
    receive_all(peer, passed_over.data(), passed_over.size());
  }
}

std::string Replicas::tell(const std::string& text) {
  if (leads()) {
    for (int peer = 1; peer < size_; ++peer) send(peer, Kind::data, text.data(), text.size());
    return text;
  }
  std::string told(receive_head(0).bytes, ' ');
  receive_all(0, told.data(), told.size());
  return told;
}

void Replicas::gather_bytes(void* all, const void* own, size_t bytes) {
  if (!leads()) {
    send(0, Kind::data, own, bytes);
    return receive(0, all, bytes * static_cast<size_t>(size_));
  }
  std::memcpy(all, own, bytes);
  for (int peer = 1; peer < size_; ++peer)
    receive(peer, static_cast<char*>(all) + static_cast<size_t>(peer) * bytes, bytes);
  for (int peer = 1; peer < size_; ++peer)
    send(peer, Kind::data, all, bytes * static_cast<size_t>(size_));
}

std::vector<double> Replicas::gather(double value) {
  std::vector<double> values(static_cast<size_t>(size_));
  gather_bytes(values.data(), &value, sizeof value);
  return values;
}

void Replicas::connect(Device device) {
  using Name = std::array<char, 128>;
  Name own{};
  device_description(device).copy(own.data(), own.size() - 1);
  std::vector<Name> names(static_cast<size_t>(size_));
  gather_bytes(names.data(), own.data(), own.size());
  for (int rank = 1; rank < size_; ++rank)
    if (names[static_cast<size_t>(rank)] != names[0])
      fail("replica 0 has {}, replica {} {}: replicas have the same bits on GPUs of one kind alone",
           names[0].data(), rank, names[static_cast<size_t>(rank)].data());
  if (!device.is_cuda()) return;
  const std::string id = tell(leads() ? cuda::Communicator::new_id() : "");
  const Wait wait(waits_);
  communicator_ = std::make_unique<cuda::Communicator>(id, rank_, size_);
}

void Replicas::gather(const Tensor& all, const Tensor& own) {
  QLAB_CHECK(all.numel() == size_ * own.numel() && all.contiguous() && own.contiguous() &&
                 all.dtype() == DType::f32 && own.dtype() == DType::f32,
             "[gather] of {} ranks: {} of {}", size_, all.str(), own.str());
  check_device("gather", all, own);
  on_device(
      all.device(), [&] { gather_bytes(all.raw(), own.raw(), static_cast<size_t>(own.bytes())); },
      [&] {
        const Wait wait(waits_);
        communicator_->gather(all.data<float>(), own.data<float>(),
                              static_cast<size_t>(own.numel()));
        cuda::synchronize();
      });
}

void Replicas::report(const std::string& error) noexcept {
  try {
    send(0, Kind::error, error.data(), error.size());
  } catch (const std::exception&) {  // rank 0 has ended, and had its own reason
  }
}

}  // namespace qlab
