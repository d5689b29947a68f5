#include "optim/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "core/ops/copy.h"

namespace qlab {
namespace {

Tensor maps_on(Device device) {
  if (device.is_meta()) return Tensor::empty({2, 256}, DType::f32, device);
  std::vector<float> both(dynamic_map().begin(), dynamic_map().end());
  both.insert(both.end(), unsigned_dynamic_map().begin(), unsigned_dynamic_map().end());
  return Tensor::from_vector(both, {2, 256}, device);
}

Tensor table_on(const std::vector<int64_t>& table, Device device) {
  const Shape shape = {static_cast<int64_t>(table.size()) / 3, 3};
  return device.is_meta() ? Tensor::empty(shape, DType::i64, device)
                          : Tensor::from_vector(table, shape, device);
}

}  // namespace

AdamW::AdamW(const AdamWConfig& config, const std::vector<int64_t>& sizes, Device device)
    : config_(config), parameters_(std::accumulate(sizes.begin(), sizes.end(), int64_t{0})) {
  const MemoryTag tag(Category::optimizer);
  const MemoryName name("AdamW");
  constexpr int64_t block = Moments::block_size;
  static_assert(block == adamw8bit_block);
  norm_ = Tensor::zeros({1}, DType::f32, device);
  step_ = Tensor::empty({8}, DType::f32, device);
  partials_ = Tensor::empty({grad_norm_partials}, DType::f64, device);
  if (config.eight_bit) {
    blocks_ = Blocks8::of(sizes);
    table_ = table_on(blocks_.table, device);
    maps_ = maps_on(device);
    absmax_ = Tensor::zeros({2, blocks_.coded}, DType::f32, device);
    plain_ = Tensor::zeros({2, block * blocks_.plain}, DType::f32, device);
    moments_ = std::make_unique<Moments>(blocks_.coded, DType::u8, config.paged, device);
  } else {
    moments_ = std::make_unique<Moments>((parameters_ + block - 1) / block, DType::f32,
                                         config.paged, device);
  }
}

int64_t AdamW::moment_size() const {
  return config_.eight_bit ? Moments::block_size * blocks_.coded : parameters_;
}

void AdamW::begin(float lr) {
  ++steps_;
  const auto t = static_cast<double>(steps_);
  const AdamWStep s{
      lr,
      config_.beta1,
      config_.beta2,
      config_.eps,
      config_.weight_decay,
      static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta1), t)),
      static_cast<float>(std::sqrt(1.0 - std::pow(static_cast<double>(config_.beta2), t))),
      config_.max_grad_norm};
  const Device device = step_.device();
  const MemoryTag tag(Category::workspace);
  const Tensor host =
      Tensor::empty({8}, DType::f32, device.is_meta() ? Device::cpu().meta() : Device::cpu());
  if (!device.is_meta())
    std::copy_n(std::array{s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.correction1,
                           s.correction2_sqrt, s.max_grad_norm}
                    .data(),
                8, host.data<float>());
  copy(step_, host);
}

void AdamW::step(const Tensor& parameters, const Tensor& gradients, float lr, const Tensor& idle) {
  const Step one{this, parameters, gradients, lr};
  step(std::span(&one, 1), idle);
}

void AdamW::step(std::span<const Step> trials, const Tensor& idle) {
  std::vector<GradNorm> norms;
  for (const Step& t : trials) {
    t.optimizer->begin(t.lr);
    norms.push_back({t.optimizer->norm_, t.gradients, t.optimizer->partials_});
  }
  qlab::grad_norm(norms);
  std::vector<AdamWUpdate> updates;
  std::vector<AdamW8Update> updates8;
  const auto issue = [&] {
    adamw(updates);
    adamw8bit(updates8);
    updates.clear(), updates8.clear();
  };
  for (const Step& t : trials) {
    const AdamW& own = *t.optimizer;
    own.moments_->visit(idle, [&](int64_t first, int64_t last, const Tensor& m, const Tensor& v) {
      if (own.config_.eight_bit) {
        const Blocks8& blocks = own.blocks_;
        // The small tensors go with the last of the others.
        const int64_t end = last == blocks.coded ? last + blocks.plain : last;
        updates8.push_back({t.parameters,
                            {own.table_, own.maps_, own.absmax_, own.plain_, m, v, blocks.coded},
                            first,
                            end,
                            t.gradients,
                            own.step_,
                            own.norm_});
      } else {
        const int64_t begin = Moments::block_size * first,
                      end = std::min(Moments::block_size * last, own.parameters_);
        updates.push_back({t.parameters.slice_rows(begin, end), m.slice_rows(0, end - begin),
                           v.slice_rows(0, end - begin), t.gradients.slice_rows(begin, end),
                           own.step_, own.norm_});
      }
      // A page is here during its visit alone.
      if (own.config_.paged) issue();
    });
  }
  issue();
}

std::vector<std::pair<std::string, Tensor>> AdamW::state() const {
  std::vector<std::pair<std::string, Tensor>> state = {
      {"adamw.m", moments_->read(0, moment_size())}, {"adamw.v", moments_->read(1, moment_size())}};
  if (config_.eight_bit) {
    state.emplace_back("adamw.absmax", absmax_);
    state.emplace_back("adamw.plain", plain_);
  }
  return state;
}

void AdamW::restore(const Saved& saved, int64_t steps) {
  const DType dtype = config_.eight_bit ? DType::u8 : DType::f32;
  moments_->write(0, saved("adamw.m", {moment_size()}, dtype));
  moments_->write(1, saved("adamw.v", {moment_size()}, dtype));
  if (config_.eight_bit) {
    copy(absmax_, saved("adamw.absmax", absmax_.shape(), DType::f32));
    copy(plain_, saved("adamw.plain", plain_.shape(), DType::f32));
    synchronize(absmax_.device());
  }
  steps_ = steps;
}

}  // namespace qlab
