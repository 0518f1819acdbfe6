// Packing: weights, from floats or from the blocks of a GGUF file, into the panels of pass.h. Baseline only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "../include/pyargs/view.h"
#include "../kernels/common.h"
#include "../kernels/cpu/floats.h"
#include "pass.h"

namespace pyargs::stack {

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, float>) {
    return float_from_bfloat16(value);
  } else {
    return bfloat16_from_float(value);
  }
}

// Where a matrix of kFloat32 or kBFloat16 has a column's weight.
template <class To>
int64_t place(const Matrix& matrix, int64_t column, int64_t d) {
  constexpr int64_t kPair = 4 / sizeof(To);
  return column / kPanel * kPanel * matrix.depth + (d / kPair * kPanel + column % kPanel) * kPair + d % kPair;
}

// A row of `depth` weights as column `column` of a panel of kInt8: its largest weight becomes 127. Behind `depth`, up
// to a whole group, come zeros. A group that float16 cannot scale, or with NaN, gives NaN.
template <class From>
void pack_int8(const From* from, int64_t depth, int64_t column, char* panel) {
  for (; depth > 0; from += kGroup, depth -= kGroup, panel += panel_bytes(Format::kInt8, kGroup)) {
    const int64_t count = depth < kGroup ? depth : kGroup;
    float weight[kGroup] = {}, largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      weight[i] = convert<float>(from[i]);
      largest = std::max(largest, std::abs(weight[i]));
      finite &= std::isfinite(weight[i]);
    }
    uint16_t bits = static_cast<uint16_t>(float16_bits(bits_from_float(largest / 127.0f)));
    float scale = float_from_float16(bits);
    if (!finite || !std::isfinite(scale)) bits = 0x7e00, scale = 0.0f;
    std::memcpy(panel + column * sizeof bits, &bits, sizeof bits);
    for (int64_t i = 0; i < kGroup; ++i) {
      const float q = scale > 0.0f ? std::nearbyint(weight[i] / scale) : 0.0f;
      panel[kPanel * sizeof bits + i / 4 * 4 * kPanel + column * 4 + i % 4] =
          static_cast<char>(static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q))));
    }
  }
}

// A block of a GGUF file, of kGroup weights: float16 scale d, for Q4_1 float16 offset m, then q.
//   Q8_0  d * q, q int8
//   Q4_0  d * (q - 8), Q4_1  d * q + m: q four bits, the first half of the block in the low ones
enum class Block : int { kQ4_0, kQ4_1, kQ8_0 };

constexpr Format format_of(Block block) { return block == Block::kQ8_0 ? Format::kInt8 : Format::kInt4; }
constexpr int64_t block_bytes(Block block) { return block == Block::kQ8_0 ? 34 : block == Block::kQ4_1 ? 20 : 18; }

// A row of blocks as column `column` of a panel.
inline void pack_blocks(Block block, const uint8_t* from, int64_t depth, int64_t column, char* panel) {
  for (int64_t d = 0; d < depth;
       d += kGroup, from += block_bytes(block), panel += panel_bytes(format_of(block), kGroup)) {
    uint16_t scale;
    std::memcpy(&scale, from, sizeof scale);
    std::memcpy(panel + column * sizeof scale, &scale, sizeof scale);
    if (block == Block::kQ8_0) {
      for (int64_t i = 0; i < kGroup; ++i) {
        panel[kPanel * 2 + i / 4 * 4 * kPanel + column * 4 + i % 4] = static_cast<char>(from[2 + i]);
      }
      continue;
    }
    uint16_t offset;
    if (block == Block::kQ4_1) {
      std::memcpy(&offset, from + 2, sizeof offset);
    } else {
      offset = static_cast<uint16_t>(float16_bits(bits_from_float(-8.0f * float_from_float16(scale))));
      if (!std::isfinite(float_from_float16(offset))) throw std::runtime_error("pyargs: a block of Q4_0 is too large");
    }
    std::memcpy(panel + (kPanel + column) * sizeof offset, &offset, sizeof offset);
    const uint8_t* q = from + block_bytes(block) - kGroup / 2;
    for (int64_t i = 0; i < kGroup; i += 8) {
      uint32_t held = 0;
      for (int64_t j = 0; j < 8; ++j) {
        const uint32_t both = q[(i + j) % 16];
        held |= (i + j < 16 ? both & 15u : both >> 4) << (4 * j);
      }
      std::memcpy(panel + kPanel * 4 + (i / 8 * kPanel + column) * sizeof held, &held, sizeof held);
    }
  }
}

// The rows [panel * kPanel, ...) of a weight [rows, depth], as columns of a matrix behind `offset`; `alternate`: with
// every second panel left out.
template <class From>
void pack_panel(const Matrix& matrix, int64_t offset, bool alternate, const From* weight, int64_t rows, int64_t depth,
                std::optional<Block> block, int64_t panel) {
  constexpr int64_t kPart = 64;  // of a panel: stays in the first-level cache
  char* packed = static_cast<char*>(const_cast<void*>(matrix.weight));
  const int64_t first = panel * kPanel, last = std::min(first + kPanel, rows);
  const auto column = [&](int64_t n) { return offset + n + (alternate ? n / kPanel * kPanel : 0); };
  if (matrix.format == Format::kInt8 || matrix.format == Format::kInt4) {
    for (int64_t n = first; n < last; ++n) {
      char* to = packed + column(n) / kPanel * panel_bytes(matrix.format, matrix.depth);
      if constexpr (std::is_same_v<From, uint8_t>) {
        pack_blocks(*block, weight + n * depth, matrix.depth, column(n) % kPanel, to);
      } else {
        pack_int8(weight + n * depth, depth, column(n) % kPanel, to);
      }
    }
    return;
  }
  if constexpr (!std::is_same_v<From, uint8_t>) {
    const auto put = [&](auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      for (int64_t start = 0; start < depth; start += kPart) {
        for (int64_t n = first; n < last; ++n) {
          const From* from = weight + n * depth;
          for (int64_t d = start; d < std::min(start + kPart, depth); ++d) {
            to[place<To>(matrix, column(n), d)] = convert<To>(from[d]);
          }
        }
      }
    };
    if (matrix.format == Format::kFloat32) {
      put(reinterpret_cast<float*>(packed));
    } else {
      put(reinterpret_cast<uint16_t*>(packed));
    }
  }
}

inline void pack_panel(const Matrix& matrix, int64_t offset, bool alternate, const View& weight,
                       std::optional<Block> block, int64_t panel) {
  const auto pack = [&](const auto* from) {
    pack_panel(matrix, offset, alternate, from, weight.size(0), weight.size(1), block, panel);
  };
  if (block) return pack(weight.as<const uint8_t>());
  if (weight.type == View::kFloat32) return pack(weight.as<const float>());
  pack(weight.as<const uint16_t>());
}

// A packed panel of the head in eight bits. The error is that of the weights and what the sums of both products lose by
// rounding, each at most depth / 2^24 |w| |x|, with as much again to spare.
template <class To>
void make_screen(const Matrix& head, const To* packed, const Screen& screen, int64_t dim, int64_t panel) {
  char* group = const_cast<char*>(screen.panels) + panel * (padded(dim) / kGroup) * kGroupBytes;
  float length[kPanel] = {}, wrong[kPanel] = {};  // squared
  bool empty[kPanel];
  std::fill_n(empty, kPanel, true);
  for (int64_t start = 0; start < dim; start += kGroup, group += kGroupBytes) {
    float weight[kGroup][kPanel] = {}, largest[kPanel] = {}, scale[kPanel], inverse[kPanel];
    for (int64_t i = 0; i < std::min(kGroup, dim - start); ++i) {
      for (int64_t n = 0; n < kPanel; ++n) {
        weight[i][n] = convert<float>(packed[place<To>(head, panel * kPanel + n, start + i)]);
        largest[n] = std::max(largest[n], std::abs(weight[i][n]));
        length[n] += weight[i][n] * weight[i][n];
      }
    }
    for (int64_t n = 0; n < kPanel; ++n) {
      scale[n] = largest[n] > kShortest * kShortest ? largest[n] / 127.0f : 0.0f;
      inverse[n] = scale[n] > 0.0f ? 1.0f / scale[n] : 0.0f;
      empty[n] &= largest[n] == 0.0f;
    }
    std::memcpy(group, scale, sizeof scale);
    for (int64_t i = 0; i < kGroup; ++i) {
      for (int64_t n = 0; n < kPanel; ++n) {
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        const float near = (weight[i][n] * inverse[n] + kRound) - kRound;
        const float held = std::abs(near) <= 127.0f ? near : 0.0f;
        const float off = weight[i][n] - held * scale[n];
        wrong[n] += off * off;
        group[sizeof scale + i / 4 * 4 * kPanel + n * 4 + i % 4] = static_cast<char>(static_cast<int8_t>(held));
      }
    }
  }
  for (int64_t n = 0; n < kPanel; ++n) {
    const float all = std::sqrt(length[n]), off = std::sqrt(wrong[n]);
    const float error = (off + std::ldexp(static_cast<float>(dim + kGroup), -22) * (all + off)) * 1.01f;
    const bool known = (all >= kShortest && all <= kLongest) || (all == 0.0f && empty[n]);
    const_cast<float*>(screen.error)[panel * kPanel + n] = known ? error : std::numeric_limits<float>::infinity();
  }
}

inline void make_screen(const Matrix& head, const Screen& screen, int64_t dim, int64_t panel) {
  if (head.format == Format::kFloat32)
    return make_screen(head, static_cast<const float*>(head.weight), screen, dim, panel);
  make_screen(head, static_cast<const uint16_t*>(head.weight), screen, dim, panel);
}

}  // namespace pyargs::stack
