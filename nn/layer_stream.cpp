#include "nn/layer_stream.h"

#include <algorithm>

#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {
namespace {

constexpr int64_t alignment = 256;

int64_t aligned(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace

struct LayerStream::Slot {
  Tensor block;               // u8 [bytes], on the device
  std::ptrdiff_t layer = -1;  // whose values it has or is about to have
  bool on_the_way = false;
  std::unique_ptr<cuda::Event> arrived;
};

LayerStream::LayerStream(Device device) : device_(device), pass_(device) {
  if (!device.is_cuda()) return;
  copies_ = std::make_unique<cuda::CopyStream>();
  issued_ = std::make_unique<cuda::Event>();
}

LayerStream::~LayerStream() {
  try {
    if (device_.is_cuda() && !layers_.empty()) cuda::synchronize();
  } catch (const Error&) {  // of a kernel before: said when it was met
  }
}

Tensor LayerStream::host_block(int64_t bytes) const {
  if (!device_.is_cuda()) {
    const MemoryTag tag(Category::weights);
    const MemoryName name("streamed layer, on the host");
    return Tensor::empty({bytes}, DType::u8,
                         device_.is_meta() ? Device::cpu().meta() : Device::cpu());
  }
  const int64_t free = available_memory(Device::cpu());
  void* data = bytes <= free ? cuda::allocate_pinned(static_cast<size_t>(bytes)) : nullptr;
  if (data == nullptr)
    throw OutOfMemory(
        fmt::format("layer {} of those that are streamed needs {} of page-locked host memory, and "
                    "the host has {}; set a smaller model.streamed_layers",
                    layers_.size(), format_bytes(bytes), format_bytes(free)));
  return Tensor::from_storage(Storage::wrap(data, bytes, {data, cuda::release_pinned}), 0, {bytes},
                              DType::u8);
}

size_t LayerStream::add(const std::vector<Tensor*>& parts) {
  int64_t bytes = 0;
  for (const Tensor* part : parts) bytes += aligned(part->bytes());
  const Tensor host = host_block(bytes);
  const size_t layer = layers_.size();
  layers_.push_back(host);
  if (static_cast<int64_t>(slots_.size()) < most_slots) {
    const MemoryTag tag(Category::weights);
    const MemoryName name("slot of streamed layers");
    Slot& slot = *slots_.emplace_back(std::make_unique<Slot>());
    slot.block = Tensor::empty({bytes}, DType::u8, device_);
    if (device_.is_cuda()) slot.arrived = std::make_unique<cuda::Event>();
  }
  // The first two layers make a slot each, so that a layer's number decides its slot.
  const Tensor& block = slots_[layer % most_slots]->block;
  QLAB_CHECK(block.bytes() == bytes, "layers of {} and {} bytes cannot share a slot", block.bytes(),
             bytes);
  std::vector<Tensor> read;  // until the copies are done
  int64_t offset = 0;
  for (Tensor* part : parts) {
    copy(host.bytes_at(offset, part->shape(), part->dtype()), *part);
    read.push_back(std::exchange(*part, block.bytes_at(offset, part->shape(), part->dtype())));
    offset += aligned(read.back().bytes());
  }
  synchronize(device_);
  return layer;
}

int64_t LayerStream::host_bytes() const {
  int64_t bytes = 0;
  for (const Tensor& layer : layers_) bytes += layer.bytes();
  return bytes;
}

void LayerStream::begin(Device device) {
  pass_ = device;
  current_ = -1;
  for (const auto& slot : slots_) slot->layer = -1, slot->on_the_way = false;
  if (pass_.is_cuda()) issued_->record();
  for (size_t layer = 0; layer < slots_.size(); ++layer) fetch(layer);
}

void LayerStream::fetch(size_t layer) {
  Slot& slot = slot_of(layer);
  slot.layer = static_cast<std::ptrdiff_t>(layer);
  slot.on_the_way = true;
  if (pass_.is_cpu()) copy(slot.block, layers_[layer]);
  if (!pass_.is_cuda()) return;
  issued_->wait(copies_.get());
  copies_->copy(slot.block.raw(), layers_[layer].raw(), static_cast<size_t>(slot.block.bytes()));
  slot.arrived->record(copies_.get());
}

void LayerStream::arrive(Slot& slot) {
  if (!std::exchange(slot.on_the_way, false)) return;
  {
    const OpScope scope("streamed layer", pass_, {0, bytes_of_all(slot.block)});
    if (pass_.is_cuda()) slot.arrived->wait();
  }
  // It was sent for when the layer before was needed, and can overlap with what came since.
  WorkCounter::next_part();
}

void LayerStream::need(size_t layer) {
  const auto wanted = static_cast<std::ptrdiff_t>(layer);
  if (wanted == current_) return;
  const std::ptrdiff_t next = wanted < current_ ? wanted - 1 : wanted + 1;
  if (pass_.is_cuda()) issued_->record();
  if (slot_of(layer).layer != wanted) fetch(layer);
  arrive(slot_of(layer));
  current_ = wanted;
  if (next < 0 || next >= size() || slot_of(static_cast<size_t>(next)).layer == next) return;
  fetch(static_cast<size_t>(next));
}

void LayerStream::end() {
  for (const auto& slot : slots_) arrive(*slot);
}

}  // namespace qlab
