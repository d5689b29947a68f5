#include "optim/adamw8bit.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_f32(const char* name, const Tensor& x, const Shape& shape, const Tensor& like) {
  check_shape("adamw8bit", name, x, shape);
  QLAB_CHECK(x.dtype() == DType::f32, "[adamw8bit] {} must be float32, got {}", name, x.str());
  check_device("adamw8bit", like, x);
}

}  // namespace

Blocks8 Blocks8::of(const std::vector<int64_t>& sizes) {
  Blocks8 blocks;
  int64_t number = 0;
  for (const bool coded : {true, false}) {
    int64_t begin = 0;
    for (const int64_t size : sizes) {
      if (size > 0 && (size >= adamw8bit_min_size) == coded) {
        blocks.table.insert(blocks.table.end(), {number, begin, begin + size});
        number += (size + adamw8bit_block - 1) / adamw8bit_block;
      }
      begin += size;
    }
    if (coded) blocks.coded = number;
  }
  blocks.plain = number - blocks.coded;
  return blocks;
}

namespace {

void check(const AdamW8Update& t) {
  const int64_t n = t.param.numel();
  const Moments8& s = t.moments;
  check_f32("param", t.param, {n}, t.param);
  check_f32("grad", t.grad, {n}, t.param);
  check_f32("step", t.step, {8}, t.param);
  check_f32("norm", t.norm, {1}, t.param);
  check_f32("maps", s.maps, {2, 256}, t.param);
  check_f32("absmax", s.absmax, {2, s.coded}, t.param);
  check_f32("plain", s.plain, {2, s.plain.dim(1)}, t.param);
  QLAB_CHECK(
      0 <= t.first && t.first <= t.last && t.last <= s.coded + s.plain.dim(1) / adamw8bit_block,
      "[adamw8bit] there are no blocks {} to {}", t.first, t.last);
  const int64_t codes = adamw8bit_block * std::max<int64_t>(std::min(t.last, s.coded) - t.first, 0);
  for (const Tensor* x : {&s.m, &s.v}) {
    check_shape("adamw8bit", "codes", *x, {codes});
    QLAB_CHECK(x->dtype() == DType::u8, "[adamw8bit] codes must be uint8, got {}", x->str());
    check_device("adamw8bit", t.param, *x);
  }
}

}  // namespace

void adamw8bit(std::span<const AdamW8Update> trials) {
  int64_t blocks = 0;
  for (const AdamW8Update& t : trials) {
    check(t);
    check_device("adamw8bit", trials[0].param, t.param);
    blocks += t.last - t.first;
  }
  if (blocks == 0) return;
  const Device device = trials[0].param.device();
  // Read and written: p and both codes; read: g.
  const OpScope scope("adamw8bit", device,
                      {0, 16.0 * static_cast<double>(adamw8bit_block * blocks)});
  on_device(
      device, [&] { cpu::adamw8bit(trials); }, [&] { cuda::adamw8bit(trials); });
}

namespace cpu {
namespace {

void update(const AdamW8Update& t) {
  const float gradient_norm = *t.norm.data<float>();
  if (!std::isfinite(gradient_norm)) return;
  const Moments8& moments = t.moments;
  const int64_t first = t.first, last = t.last;
  const AdamWStep s = adamw_step(t.step.data<float>());
  const float clip = clip_factor(s, gradient_norm);
  const int64_t coded = moments.coded, tensors = moments.table.dim(0);
  const int64_t* table = moments.table.data<int64_t>();
  const float *map = moments.maps.data<float>(), *unsigned_map = map + 256,
              *g = t.grad.data<float>();
  float *p = t.param.data<float>(), *absmax = moments.absmax.data<float>();
  float *plain_m = moments.plain.data<float>(), *plain_v = plain_m + moments.plain.dim(1);
  uint8_t *m_codes = moments.m.data<uint8_t>(), *v_codes = moments.v.data<uint8_t>();
  parallel_for(last - first, 64, [=](int64_t from, int64_t to) {
    for (int64_t b = first + from; b < first + to; ++b) {
      const int64_t* own = table + 3 * tensor_of_block(table, tensors, b);
      const int64_t begin = own[1] + (b - own[0]) * adamw8bit_block;
      const int64_t count = std::min(adamw8bit_block, own[2] - begin);
      if (b >= coded) {
        float *m = plain_m + (b - coded) * adamw8bit_block, *v = plain_v + (m - plain_m);
        for (int64_t i = 0; i < count; ++i)
          adamw8bit_rule(p[begin + i], m[i], v[i], g[begin + i], s, clip);
        continue;
      }
      uint8_t *m_code = m_codes + (b - first) * adamw8bit_block,
              *v_code = v_codes + (m_code - m_codes);
      float m[adamw8bit_block], v[adamw8bit_block], m_max = 0, v_max = 0;
      for (int64_t i = 0; i < count; ++i) {
        m[i] = map[m_code[i]] * absmax[b];
        v[i] = unsigned_map[v_code[i]] * absmax[coded + b];
        adamw8bit_rule(p[begin + i], m[i], v[i], g[begin + i], s, clip);
        m_max = std::max(m_max, std::abs(m[i])), v_max = std::max(v_max, v[i]);
      }
      absmax[b] = m_max, absmax[coded + b] = v_max;
      for (int64_t i = 0; i < count; ++i) {
        m_code[i] = signed_code(map, m[i], m_max);
        v_code[i] = dynamic_code(unsigned_map, v[i] / v_max);
      }
    }
  });
}

}  // namespace

void adamw8bit(std::span<const AdamW8Update> trials) {
  for (const AdamW8Update& t : trials) update(t);
}

}  // namespace cpu
}  // namespace qlab
