// Products with NF4 weights by warpgroups of compute capability 9.0 (quant/nf4_linear.h), the
// kernel: some warpgroups decode W into shared memory, others multiply.
#pragma once
#include "cuda/early_launch.cuh"
#include "cuda/hopper.cuh"
#include "cuda/nf4_decode.cuh"

namespace qlab::cuda {
namespace hopper {

constexpr int depth = chunk_width;
constexpr int slot_steps = 2;  // whose codes come in one copy

// Tiles are those of the transposed product, y^T = W x^T or dx^T = W^T dy^T: `outputs` by `tokens`
// rows of x, in steps of 64 along the sum. Of 128 outputs each of the two warpgroups that multiply
// has 64; 64 outputs have half of the rows of x in each, unless there are only 64.
template <bool forward_, int outputs_, int tokens_, int pair_>
struct Nf4Plan {
  static constexpr bool forward = forward_;
  static constexpr int outputs = outputs_, tokens = tokens_;
  static constexpr bool narrow = outputs == 64;
  static constexpr int consumers = narrow && tokens == 64 ? 1 : 2;  // warpgroups
  static constexpr int decoders = !narrow && tokens == 256 ? 2 : 3;
  static constexpr int pair = pair_;  // blocks that share rows of x
  static constexpr int group_outputs = 64, group_tokens = narrow ? tokens / consumers : tokens;
  static constexpr int threads = (consumers + decoders) * warpgroup_size;
  static constexpr int box_rows = tokens == 64 ? 32 : 64;  // of a copy of x
  static constexpr int boxes = tokens / box_rows;
  static constexpr int stages = tokens == 256   ? (narrow ? 5 : 4)
                                : tokens == 128 ? (narrow ? 6 : 5)
                                                : (narrow ? 8 : 6);
  static constexpr int code_slots = tokens == 256   ? (narrow ? 6 : 4)
                                    : tokens == 128 ? (narrow ? 10 : 6)
                                                    : (narrow ? 12 : 8);
  // Of a copy of codes: rows of W by two steps, or two steps of rows by columns.
  static constexpr int slot_row_bytes = forward ? slot_steps * depth / 2 : outputs / 2;
  static constexpr int slot_rows = forward ? outputs : slot_steps * depth;
  static constexpr int slot_bytes = slot_row_bytes * slot_rows;
  // Weights that a thread of a warpgroup that decodes has of a step, in 16-byte pieces of codes.
  static constexpr int pieces = outputs * depth / warpgroup_size / 32;
  // Parts of a sum meet in memory, instead of shared memory of a cluster.
  static constexpr bool parts_in_memory = narrow;
  // Registers a thread, of all that the block has at its start.
  static constexpr int consumer_registers = decoders == 2 ? 168 : 128;
  static constexpr int decoder_registers = decoders == 2 ? 88 : 72;
};

namespace {

constexpr int most_parts = 3;  // of a sum

/// A decoder that waits for the codes of step t has filled a stage for step t - decoders, so step
/// t - decoders - stages and all before it have been multiplied, and their codes had come. Those
/// that lay in the slot before must be among them: otherwise their phase may still be open, and the
/// parity of the phase before it is that of the one waited for.
template <class P>
constexpr bool tells_phases_apart() {
  return P::code_slots * slot_steps > P::decoders + P::stages;
}

struct Nf4Arguments {
  CUtensorMap x, y, addend, codes;
  Scales scales;
  bf16* y_data;
  const bf16* addend_data;
  float4* sums;  // of the parts that came first, where they meet in memory
  int64_t y_pitch, addend_pitch;
  uint32_t runs_per_row;  // of 64 weights
  int steps;              // of 64 terms of a sum
  int part_steps;         // of them, those of one block
  int parts;
  int rows;  // of x
  int token_tiles;
  bool add;
};

template <class P>
struct Nf4Shared {
  struct Stage {
    bf16 x[P::tokens * depth];
    bf16 w[P::outputs * depth];
  };
  static constexpr int stages = P::stages, code_slots = P::code_slots;
  Stage ring[stages];
  uint8_t codes[code_slots][P::slot_bytes];
  float map[map_size];
  Barrier full[stages], empty[stages], codes_full[code_slots], codes_empty[code_slots],
      addend[P::consumers];
  bool second;  // of the two parts of the tile, to start

  __device__ void init() {
    constexpr int warps = warpgroup_size / 32;
    for (int i = 0; i < stages; ++i) {
      init_barrier(full[i], 1 + warps);
      init_barrier(empty[i], P::pair * P::consumers * warps);
    }
    for (int i = 0; i < code_slots; ++i) {
      init_barrier(codes_full[i], 1);
      init_barrier(codes_empty[i], slot_steps * warps);
    }
    for (int i = 0; i < P::consumers; ++i) init_barrier(addend[i], 1);
    fence_barrier_init();
  }
};

/// What a block works on. A pair with neighbouring outputs has the same rows of x. Parts of their
/// sums are further pairs, of the same cluster unless they meet in memory.
struct Nf4Tile {
  int rank, place;  // in the cluster, in the pair
  int part;
  int pair_rank;  // of the first of the pair
  int number, output, token;
  int first_step, steps;
  template <class P>
  __device__ Nf4Tile(const Nf4Arguments& a, P) {
    const int pairs = static_cast<int>(blockIdx.x) / P::pair, tile = pairs / a.parts;
    rank = static_cast<int>(cluster_rank());
    place = rank % P::pair;
    part = pairs % a.parts;
    pair_rank = rank - place;
    const int column = tile / a.token_tiles * P::pair + place, row = tile % a.token_tiles;
    number = column * a.token_tiles + row;
    output = column * P::outputs;
    token = row * P::tokens;
    first_step = part * a.part_steps;
    steps = min(a.part_steps, a.steps - first_step);
  }
};

/// Two parts of a sum that meet in memory: the block that started first leaves its sums there, the
/// other adds its own, so that a block waits for none that has yet to start. All is 0 between
/// launches, which follow each other on a device's one stream.
struct Meeting {
  uint32_t started, written[2];  // a count, and whether a warpgroup's sums are there
};
constexpr int max_meetings = 1024;
__device__ Meeting meetings[max_meetings];

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// __byte_perm would mask the selector first.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

/// The 16 values of a block in bf16, their low and high bytes apart: 16 entries are four registers
/// of either, and a permutation looks four codes up in two of them.
struct ValueTable {
  uint32_t low[4], high[4];

  __device__ explicit ValueTable(float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a =
          pack(__fmul_rn(nf4::value(4 * i), scale), __fmul_rn(nf4::value(4 * i + 1), scale));
      const uint32_t b =
          pack(__fmul_rn(nf4::value(4 * i + 2), scale), __fmul_rn(nf4::value(4 * i + 3), scale));
      low[i] = permute(a, b, 0x6420);
      high[i] = permute(a, b, 0x7531);
    }
  }
  /// Four codes: their three low bits in `three`; in `half` their own number, plus 4 for entries
  /// from the eighth on. The first of two codes is the high nibble of a byte.
  __device__ void look_up(uint32_t& first, uint32_t& second, uint32_t three, uint32_t half) const {
    const uint32_t l =
        permute(permute(low[0], low[1], three), permute(low[2], low[3], three), half);
    const uint32_t h =
        permute(permute(high[0], high[1], three), permute(high[2], high[3], three), half);
    first = permute(l, h, 0x4051);
    second = permute(l, h, 0x6273);
  }
  __device__ uint4 look_up(uint32_t word) const {
    const uint32_t three = word & 0x77777777u;
    const uint32_t half = (word >> 1 & 0x44444444u) | 0x32103210u;
    uint4 v;
    look_up(v.x, v.y, three, half);
    look_up(v.z, v.w, three >> 16, half >> 16);
    return v;
  }
};

/// Into row `row` of a swizzled tile, from its piece `first` on.
template <int pieces>
__device__ inline void put_weights(bf16* tile, int row, int first, const uint4 (&words)[pieces],
                                   float scale) {
  const ValueTable table(scale);
  char* const base = reinterpret_cast<char*>(tile) + row * row_bytes;
  const auto put = [&](int p, uint32_t word) {
    *reinterpret_cast<uint4*>(base + (((first + p) ^ row % 8) * 16)) = table.look_up(word);
  };
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    put(4 * i, words[i].x);
    put(4 * i + 1, words[i].y);
    put(4 * i + 2, words[i].z);
    put(4 * i + 3, words[i].w);
  }
}

/// Brings this block's share of the rows of x to the blocks of its pair; rows beyond the last one
/// are left as they are, since nothing of them is stored.
template <class P>
__device__ void copy_rows(const Nf4Arguments& a, bf16* x, Barrier& full, const Nf4Tile& tile,
                          int present, int step) {
  constexpr int pair = P::pair;
  const auto blocks = static_cast<uint16_t>(((1 << pair) - 1) << tile.pair_rank);
  arrive_expect(full, present * P::box_rows * row_bytes);
#pragma unroll
  for (int j = 0; j < P::boxes / pair; ++j)
    if (const int i = tile.place * (P::boxes / pair) + j; i < present)
      load_box(x + i * P::box_rows * depth, a.x, full, blocks, step * depth,
               tile.token + i * P::box_rows);
}

/// The codes of slot `slot` of this block's part.
template <class P>
__device__ void copy_codes(const Nf4Arguments& a, Nf4Shared<P>& shared, const Nf4Tile& tile,
                           int slot) {
  Barrier& full = shared.codes_full[slot % P::code_slots];
  arrive_expect(full, P::slot_bytes);
  const int step = tile.first_step + slot * slot_steps;
  constexpr int words = 2;  // bytes of an element of the map
  load_box(shared.codes[slot % P::code_slots], a.codes, full, static_cast<uint16_t>(1 << tile.rank),
           P::forward ? step * (depth / 2 / words) : tile.output / 2 / words,
           P::forward ? tile.output : step * depth);
}

/// One of the warpgroups that decode, which take steps in turn: 64 weights a thread, of 64 outputs
/// 32. The first of them also has codes copied.
template <class P>
__device__ void decode(const Nf4Arguments& a, Nf4Shared<P>& shared, const Nf4Tile& tile,
                       int decoder) {
  constexpr int batch = 4;  // own steps whose scales are loaded together, a batch ahead
  const int thread = threadIdx.x % warpgroup_size, lane = threadIdx.x % 32;
  const float offset = a.scales.offset != nullptr ? *a.scales.offset : 0.0f;
  // Of the tile in shared memory, whose rows are outputs or, for dx, 64 terms of each 64 outputs.
  const int tile_row = thread % P::outputs, first_piece = thread / P::outputs * 4;
  const uint32_t row = P::forward ? tile.output + tile_row : thread % depth;
  const uint32_t column = P::forward ? 0 : tile.output / depth + tile_row / depth;
  const uint32_t stride = P::forward ? 1 : depth * a.runs_per_row;
  const uint32_t first = row * a.runs_per_row + column + tile.first_step * stride;
  const int boxes = min(P::boxes, (a.rows - tile.token + P::box_rows - 1) / P::box_rows);
  const int slots = (tile.steps + slot_steps - 1) / slot_steps;
  const bool leader = thread == 0, copier = leader && decoder == 0;

  const auto entry = [&](int code) { return shared.map[code]; };
  AnyScale next[batch];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int u = 0; u < batch; ++u)
      next[u].fetch(a.scales, (first + min(from + u * P::decoders, tile.steps - 1) * stride) >>
                                  (a.scales.shift - 6));
  };
  const auto read = [&](uint4(&words)[P::pieces], const uint8_t* slot, int half) {
    const int r = P::forward ? tile_row : half * depth + thread % depth;
    const int piece = P::narrow ? thread / depth + (P::forward ? 2 * half : 0)
                                : 2 * (P::forward ? half : thread / depth);
    const uint8_t* const from = slot + r * P::slot_row_bytes;
    const int swizzle = P::slot_row_bytes == 64 ? r / 2 % 4 : r / 4 % 2;
#pragma unroll
    for (int i = 0; i < P::pieces; ++i)
      words[i] = *reinterpret_cast<const uint4*>(from + ((piece + i) ^ swizzle) * 16);
  };

  int copied = 0;
  if (copier)
    for (; copied < min(P::code_slots, slots); ++copied) copy_codes<P>(a, shared, tile, copied);
  fetch(decoder);
  await_previous();  // which may write x
  Ring<P::stages> ring;
  for (int i = 0; i < decoder; ++i) ring.advance();
  for (int base = decoder; base < tile.steps; base += batch * P::decoders) {
    float scale[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u) scale[u] = next[u].value(a.scales, entry, offset);
    fetch(base + batch * P::decoders);
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int step = base + u * P::decoders;
      if (step >= tile.steps) break;
      // Two slots behind, so as not to wait for the other decoders.
      if (const int until = min(slots, step / slot_steps + P::code_slots - 1); copier)
        for (; copied < until; ++copied) {
          wait(shared.codes_empty[copied % P::code_slots], (copied / P::code_slots - 1) & 1);
          copy_codes<P>(a, shared, tile, copied);
        }
      const int slot = step / slot_steps, place = slot % P::code_slots;
      wait(shared.codes_full[place], slot / P::code_slots & 1);
      uint4 words[P::pieces];
      read(words, shared.codes[place], step % slot_steps);
      auto& stage = shared.ring[ring.stage];
      Barrier& full = shared.full[ring.stage];
      wait(shared.empty[ring.stage], ring.parity ^ 1);
      if (leader) copy_rows<P>(a, stage.x, full, tile, boxes, tile.first_step + step);
      put_weights(stage.w, tile_row, first_piece, words, scale[u]);
      // Not before the codes have been used: an arrival does not wait for reads under way, and with
      // cold caches some took longer than the next copy into the slot.
      arrive_warp(shared.codes_empty[place], lane);
      arrive_warp(full, lane);
#pragma unroll
      for (int i = 0; i < P::decoders; ++i) ring.advance();
    }
  }
}

/// d [64, group_tokens] of one warpgroup. The fence between the decoders' writes and the products
/// that read them stands on this side of the barrier, where no loads are under way: 3 to 5 %
/// faster.
template <class P>
__device__ void multiply(float (&d)[P::group_tokens / 2], Nf4Shared<P>& shared, const Nf4Tile& tile,
                         int group) {
  const auto release = [&](int stage) {
    __syncwarp();
    if (const uint32_t lane = threadIdx.x % 32; lane < P::pair)
      arrive_in(shared.empty[stage], tile.pair_rank + lane);
  };
  Ring<Nf4Shared<P>::stages> ring;
  for (int step = 0; step < tile.steps; ++step) {
    wait(shared.full[ring.stage], ring.parity);
    fence_async();
    const auto& stage = shared.ring[ring.stage];
    const uint64_t w = operand(stage.w + (P::narrow ? 0 : group * P::group_outputs * depth), 0);
    const uint64_t x = operand(stage.x + (P::narrow ? group * P::group_tokens * depth : 0), 0);
    products_begin();
#pragma unroll
    for (int k = 0; k < depth / 16; ++k) {
      const uint64_t left = advanced(w, k * (P::forward ? 32 : 16 * row_bytes));
      const uint64_t right = advanced(x, k * 32);
      const bool more = step != 0 || k != 0;
      if constexpr (P::group_tokens == 256) {
        product<P::forward ? 0 : 1>(reinterpret_cast<float(&)[64]>(d[0]), left, right, more);
        product<P::forward ? 0 : 1>(reinterpret_cast<float(&)[64]>(d[64]), left,
                                    advanced(right, 128 * row_bytes), more);
      } else {
        product<P::forward ? 0 : 1>(d, left, right, more);
      }
    }
    products_commit();
    if (step != 0) {
      products_wait<1>();
      release(ring.previous());
    }
    ring.advance();
  }
  products_wait<0>();
  pin(d);
}

/// Writes the tile [64, group_tokens] of a warpgroup to y, turned around in `rows`, which may first
/// receive what is to be added.
template <class P>
__device__ void put_rows(const Nf4Arguments& a, float (&d)[P::group_tokens / 2], char* rows,
                         Barrier& addend, const Nf4Tile& tile, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int output = tile.output + (P::narrow ? 0 : group * P::group_outputs);
  const int token = tile.token + (P::narrow ? group * P::group_tokens : 0);
  const bool leader = threadIdx.x % warpgroup_size == 0;
  char* const place =
      rows + (matrix / 2 * 8 + lane % 8) * row_bytes + ((2 * warp + matrix % 2) ^ lane % 8) * 16;
  if (a.add) {
    if (leader) {
      arrive_expect(addend, P::group_tokens * row_bytes);
      load_box(rows, a.addend, addend, static_cast<uint16_t>(1 << tile.rank), output, token);
    }
    wait(addend, 0);
  }
#pragma unroll
  for (int i = 0; i < P::group_tokens / 2; i += 8) {
    char* const tiles = place + i / 4 * 8 * row_bytes;
    if (a.add) {
      uint32_t more[4];
      load_transposed(more, tiles);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float first, second;
        unpack(first, second, more[j]);
        d[i + 2 * j] += first, d[i + 2 * j + 1] += second;
      }
    }
    store_transposed(tiles, pack(d[i], d[i + 1]), pack(d[i + 2], d[i + 3]),
                     pack(d[i + 4], d[i + 5]), pack(d[i + 6], d[i + 7]));
  }
  fence_async();
  named_sync(1 + group, warpgroup_size);
  if (leader) {
    store_box(a.y, rows, output, token);
    commit_stores_and_wait();
  }
}

/// The sums [tokens, outputs] of a block, as its warpgroups leave them for the others.
template <class P>
struct Nf4Sums {
  static constexpr int pitch = P::outputs + 4;  // floats: the stores of a warp meet in no bank
  static constexpr int bytes = P::tokens * pitch * 4;
};

template <class P>
__device__ void put_sums(float* sums, const float (&d)[P::group_tokens / 2], int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  float* const place =
      sums + lane % 4 * 2 * Nf4Sums<P>::pitch + group * P::group_outputs + warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < P::tokens / 2; ++i)
    place[(i / 4 * 8 + i % 2) * Nf4Sums<P>::pitch + i / 2 % 2 * 8] = d[i];
}

/// Adds the parts of a tile in their order; the blocks of a cluster share out the rows.
template <class P>
__device__ void add_parts(const Nf4Arguments& a, const float* sums, const Nf4Tile& tile) {
  constexpr int units = P::outputs / 4;  // of a row: a warp takes whole rows
  const int rows = min(P::tokens, a.rows - tile.token);
  constexpr int threads = P::consumers * warpgroup_size;
  for (int i = tile.part * threads + static_cast<int>(threadIdx.x); i < rows * units;
       i += a.parts * threads) {
    const int row = i / units, column = i % units * 4;
    const float* const from = sums + row * Nf4Sums<P>::pitch + column;
    float4 of_part[most_parts];
#pragma unroll
    for (int part = 0; part < most_parts; ++part)
      if (part < a.parts) of_part[part] = load_in(from, part * P::pair + tile.place);
    float4 v = make_float4(0, 0, 0, 0);
    const auto add = [&](float x, float y, float z, float w) {
      v.x += x, v.y += y, v.z += z, v.w += w;
    };
#pragma unroll
    for (int part = 0; part < most_parts; ++part)
      if (part < a.parts) add(of_part[part].x, of_part[part].y, of_part[part].z, of_part[part].w);
    const int64_t token = tile.token + row;
    if (a.add) {
      const uint2 more = *reinterpret_cast<const uint2*>(a.addend_data + token * a.addend_pitch +
                                                         tile.output + column);
      float x, y, z, w;
      unpack(x, y, more.x);
      unpack(z, w, more.y);
      add(x, y, z, w);
    }
    *reinterpret_cast<uint2*>(a.y_data + token * a.y_pitch + tile.output + column) =
        make_uint2(pack(v.x, v.y), pack(v.z, v.w));
  }
}

/// Whether d now is the whole sum, which falls to this block.
template <class P>
__device__ bool meet(const Nf4Arguments& a, float (&d)[P::group_tokens / 2], const Nf4Tile& tile,
                     int group, bool second) {
  constexpr int vectors = P::group_tokens / 8, batch = 8;
  const int thread = threadIdx.x % warpgroup_size;
  uint32_t* const written = &meetings[tile.number].written[group];
  float4* const place =
      a.sums + (tile.number * P::consumers + group) * vectors * warpgroup_size + thread;
  if (!second) {
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      __stcg(place + i * warpgroup_size,
             make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
    __threadfence();
    named_sync(1 + group, warpgroup_size);
    if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(written) : "memory");
    return false;
  }
  if (thread == 0) {
    uint32_t there = 0;
    while (there == 0)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(written) : "memory");
    *written = 0;
    if (group == 0) meetings[tile.number].started = 0;
  }
  named_sync(1 + group, warpgroup_size);
#pragma unroll
  for (int first = 0; first < vectors; first += batch) {
    float4 other[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) other[i] = __ldcg(place + (first + i) * warpgroup_size);
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      float* const own = d + 4 * (first + i);
      // From 0 on, as add_parts does.
      own[0] = (0.0f + own[0]) + other[i].x, own[1] = (0.0f + own[1]) + other[i].y;
      own[2] = (0.0f + own[2]) + other[i].z, own[3] = (0.0f + own[3]) + other[i].w;
    }
  }
  return true;
}

#endif

// One block per tile and part of the sum: the first warpgroups multiply, the others decode W into
// shared memory in bf16. W is read (0.52 bytes a weight) and decoded once per `tokens` rows, x once
// per pair of blocks.
template <class P>
__global__ void __launch_bounds__(P::threads, 1)
    nf4_linear_kernel(const __grid_constant__ Nf4Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Nf4Shared<P>*>(memory);
  auto* const sums = reinterpret_cast<float*>(shared.ring);
  static_assert(sizeof shared.ring >= Nf4Sums<P>::bytes);
  const Nf4Tile tile(arguments, P{});
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / warpgroup_size, 0);
  if (threadIdx.x == 0) shared.init();
  if (arguments.scales.map != nullptr && threadIdx.x < map_size)
    shared.map[threadIdx.x] = arguments.scales.map[threadIdx.x];
  cluster_sync();
  if (group < P::consumers) {
    take_registers<P::consumer_registers>();
    await_previous();
    if (P::parts_in_memory && threadIdx.x == 0)
      shared.second = atomicAdd(&meetings[tile.number].started, 1) == 1;
    float d[P::group_tokens / 2];
    multiply<P>(d, shared, tile, group);
    named_sync(1 + P::consumers, P::consumers * warpgroup_size);
    if (P::parts_in_memory || arguments.parts == 1) {
      cluster_arrive();
      if (!P::parts_in_memory || meet<P>(arguments, d, tile, group, shared.second))
        put_rows<P>(arguments, d,
                    reinterpret_cast<char*>(shared.ring) + group * P::group_tokens * row_bytes,
                    shared.addend[group], tile, group);
    } else if constexpr (!P::parts_in_memory) {
      put_sums<P>(sums, d, group);
      __syncwarp();
      cluster_sync();
      add_parts<P>(arguments, sums, tile);
      __syncwarp();
      cluster_arrive();
    }
  } else {
    give_registers<P::decoder_registers>();
    decode<P>(arguments, shared, tile, group - P::consumers);
    __syncwarp();
    if (!P::parts_in_memory && arguments.parts > 1) cluster_sync();
    cluster_arrive();
  }
  __syncwarp();
  cluster_wait();
#endif
}

}  // namespace
}  // namespace hopper
}  // namespace qlab::cuda
