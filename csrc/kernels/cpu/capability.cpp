// Which code a CPU runs. Baseline only.
#include "capability.h"

#ifdef PYARGS_ARM
#include <sys/auxv.h>
#endif

#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../../include/pyargs/kernels.h"

namespace pyargs {
namespace {

#ifdef PYARGS_ARM
constexpr const char* kNames[] = {"default", "dotprod"};
#else
constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
#endif

Capability detect() {
#if defined(PYARGS_ARM)
  return PYARGS_BEST >= 1 && getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? Capability::kDotprod : Capability::kDefault;
#elif PYARGS_BEST >= 1
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kDefault;
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
  if (!__builtin_cpu_supports("f16c")) return Capability::kDefault;
#endif
#if PYARGS_BEST >= 2
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (PYARGS_BEST < 3 || !__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;
    if (PYARGS_BEST < 4 || !__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Vnni;
    return Capability::kAvx512Bf16;
  }
#endif
  return Capability::kAvx2;
#else
  return Capability::kDefault;
#endif
}

std::atomic<Capability> used{detect()};

}  // namespace

Capability cpu_capability() { return used.load(std::memory_order_relaxed); }

Capability best_capability() { return detect(); }

const char* name_of(Capability capability) { return kNames[static_cast<int>(capability)]; }

const char* cpu_capability_name() { return name_of(cpu_capability()); }

void set_cpu_capability(const char* name) {
  constexpr int kLevels = std::size(kNames);
  std::string names;
  for (int level = 0; level < kLevels; ++level) {
    names += (level == 0 ? "" : level + 1 < kLevels ? ", " : " or ") + std::string(kNames[level]);
    if (std::string(name) != kNames[level]) continue;
    const auto wanted = static_cast<Capability>(level);
    if (wanted <= detect()) {
      used = wanted;
      return;
    }
    throw std::invalid_argument(std::string(level > PYARGS_BEST ? "this build has no " : "this CPU has no ") + name +
                                ", at most " + name_of(detect()));
  }
  throw std::invalid_argument("CPU capability must be " + names + ", got '" + name + "'");
}

}  // namespace pyargs
