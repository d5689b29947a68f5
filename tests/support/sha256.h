// SHA-256 (FIPS 180-4) of a byte string as hex, for checksums of golden data.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

namespace qlab::test {

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
inline std::array<uint32_t, 64> sha256_constants() {
  std::array<uint32_t, 64> k{};
  int found = 0;
  for (uint64_t p = 2; found < 64; ++p) {
    bool prime = true;
    for (uint64_t d = 2; d * d <= p; ++d) prime = prime && p % d != 0;
    if (!prime) continue;
    // floor(cbrt(p) 2^32), by bisection.
    uint64_t low = 0, high = uint64_t{1} << 36;
    while (high - low > 1) {
      const uint64_t middle = (low + high) / 2;
      const auto square = static_cast<unsigned __int128>(middle) * middle;
      const bool above = square > (static_cast<unsigned __int128>(p) << 96) / middle;
      (above ? high : low) = middle;
    }
    k[found++] = static_cast<uint32_t>(low);
  }
  return k;
}

inline std::string sha256(std::vector<uint8_t> data) {
  static const std::array<uint32_t, 64> k = sha256_constants();
  std::array<uint32_t, 8> h{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const uint64_t bits = data.size() * 8;
  data.push_back(0x80);
  while (data.size() % 64 != 56) data.push_back(0);
  for (int i = 7; i >= 0; --i) data.push_back(static_cast<uint8_t>(bits >> (8 * i)));
  for (size_t at = 0; at < data.size(); at += 64) {
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | data[at + i];
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + w[i - 7] +
             (std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3)) +
             (std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10));
    auto [a, b, c, d, e, f, g, x] = h;
    for (int i = 0; i < 64; ++i) {
      const uint32_t t1 = x + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                          ((e & f) ^ (~e & g)) + k[i] + w[i];
      const uint32_t t2 =
          (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      x = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> round{a, b, c, d, e, f, g, x};
    for (int i = 0; i < 8; ++i) h[i] += round[i];
  }
  std::string hex;
  for (const uint32_t word : h)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

}  // namespace qlab::test
