// Weights that share a scale in groups of 32: from floats, and from the blocks of a GGUF file. Baseline only. The
// formats are those of pass.h.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../kernels/common.h"
#include "../kernels/cpu/floats.h"
#include "pass.h"

namespace pyargs::stack {

// A row of `depth` weights as column `column` of a panel of kInt8: its largest weight becomes 127. Behind `depth`, up
// to a whole group, come zeros. A group that float16 cannot scale, or with NaN, gives NaN.
template <class From>
void pack_int8(const From* from, int64_t depth, int64_t column, char* panel) {
  for (; depth > 0; from += kGroup, depth -= kGroup, panel += panel_bytes(Format::kInt8, kGroup)) {
    const int64_t count = depth < kGroup ? depth : kGroup;
    float weight[kGroup] = {}, largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<From, float>) {
        weight[i] = from[i];
      } else {
        weight[i] = float_from_bfloat16(from[i]);
      }
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

}  // namespace pyargs::stack
