// Products with grouped weights (csrc/stack/grouped.h) as one processor computes them, written to a file:
//
//   grouped FILE
//
// Rows and weights in int8 must be the same bytes on every processor. Within a processor, groups that are multiplied
// with float32 must give the bits of these weights in float32. `.ci/processors` builds it for several.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../../csrc/stack/packing.h"
#ifdef PYARGS_EMULATE_AVX512
#include "avx512.h"
#endif
#include "../../../csrc/stack/grouped.h"

using namespace pyargs;
using namespace pyargs::stack;

namespace {

std::mt19937 engine(1);

// Most are between -2 and 2, some are 40 times as large.
std::vector<float> numbers(int64_t count) {
  std::vector<float> found(count);
  for (float& value : found) {
    value = static_cast<float>(engine() % 4001) / 1000.0f - 2.0f;
    if (engine() % 7 == 0) value *= 40.0f;
  }
  return found;
}

uint16_t half_at(const char* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return half;
}

// The weights of a panel in float32, [depth, kPanel].
std::vector<float> unpacked(Format format, const std::vector<char>& panel, int64_t depth) {
  std::vector<float> found(depth * kPanel);
  const int64_t held = format == Format::kInt8 ? 4 : 8, bytes = format == Format::kInt8 ? 2 : 4;
  for (int64_t d = 0; d < depth; ++d) {
    const char* group = panel.data() + panel_bytes(format, d / kGroup * kGroup);
    for (int64_t n = 0; n < kPanel; ++n) {
      const float scale = float_from_float16(half_at(group + n * 2));
      const int64_t at = kPanel * bytes + (d % kGroup / held * kPanel + n) * 4;
      if (format == Format::kInt8) {
        found[d * kPanel + n] = scale * static_cast<float>(static_cast<int8_t>(group[at + d % 4]));
      } else {
        const auto both = static_cast<uint8_t>(group[at + d % 8 / 2]);
        const float offset = float_from_float16(half_at(group + (kPanel + n) * 2));
        found[d * kPanel + n] = scale * static_cast<float>(d % 2 ? both >> 4 : both & 15) + offset;
      }
    }
  }
  return found;
}

template <Format format>
void check_floats(int64_t rows, const std::vector<float>& x, const std::vector<char>& panel, int64_t depth) {
  std::vector<float> sums(rows * kPanel, 0.5f), wanted = sums;
  multiply_grouped<format>(rows, x.data(), depth, panel.data(), depth, sums.data(), kPanel);
  const std::vector<float> weights = unpacked(format, panel, depth);
  multiply<Float32>(rows, x.data(), depth, weights.data(), kPanel, depth, wanted.data(), kPanel);
  if (std::memcmp(sums.data(), wanted.data(), sums.size() * sizeof(float)) != 0) {
    throw std::runtime_error("groups give other bits than their weights in float32");
  }
}

void write(const void* from, size_t bytes, std::FILE* file) {
  if (std::fwrite(from, 1, bytes, file) != bytes) throw std::runtime_error("the file cannot be written");
}

void check(int64_t rows, int64_t depth, std::FILE* file) {
  std::vector<float> x = numbers(rows * depth), weights = numbers(kPanel * depth);
  if (engine() % 2) {  // groups without a remainder
    for (float& weight : weights) weight = weight > 0.0f ? 1.0f : -1.0f;
  }
  std::vector<char> eight(panel_bytes(Format::kInt8, depth)), four(panel_bytes(Format::kInt4, depth));
  std::vector<uint8_t> blocks(depth / kGroup * block_bytes(Block::kQ4_1));
  for (int64_t n = 0; n < kPanel; ++n) {
    pack_int8(weights.data() + n * depth, depth, n, eight.data());
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(engine());
    for (size_t i = 0; i < blocks.size(); i += block_bytes(Block::kQ4_1)) {
      const uint16_t scales[] = {static_cast<uint16_t>(0x2000 + engine() % 0x1800),
                                 static_cast<uint16_t>(0xa000 + engine() % 0x1800)};
      std::memcpy(&blocks[i], scales, sizeof scales);
    }
    pack_blocks(Block::kQ4_1, blocks.data(), depth, n, four.data());
  }
  constexpr size_t kBytes = panel_bytes(Format::kInt8, kGroup);
  for (size_t i = 0; i < eight.size(); i += 97) {
    if (i % kBytes >= kPanel * 2) eight[i] = -128;  // a file may have it
  }
  check_floats<Format::kInt8>(rows, x, eight, depth);
  check_floats<Format::kInt4>(rows, x, four, depth);

  if (rows % 2 == 0) x[engine() % x.size()] = std::numeric_limits<float>::infinity();
  std::vector<Int8Group> quantised(rows * depth / kGroup);
  for (int64_t r = 0; r < rows; ++r) {
    Int8::put(quantised.data() + r * depth / kGroup, x.data() + r * depth, depth);
  }
  std::vector<float> sums(rows * kPanel, 0.5f);
  multiply_int8(rows, quantised.data(), depth / kGroup, eight.data(), depth / kGroup, sums.data(), kPanel);
  for (float& sum : sums) sum = std::isnan(sum) ? 0.0f : sum;  // processors have NaN of their own
  for (Int8Group& group : quantised) group.scale = std::isnan(group.scale) ? 0.0f : group.scale;
  write(quantised.data(), quantised.size() * sizeof quantised[0], file);
  write(sums.data(), sums.size() * sizeof sums[0], file);
}

}  // namespace

int main(int count, char** words) try {
  std::FILE* file = count == 2 ? std::fopen(words[1], "wb") : nullptr;
  if (!file) throw std::runtime_error("grouped FILE");
  for (int64_t rows : {1, 2, 3, 4, 5, 8, 9, 13, 25, 48}) {
    for (int64_t depth : {32, 64, 160, 1056}) check(rows, depth, file);
  }
  std::fclose(file);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "grouped: %s\n", error.what());
  return 1;
}
