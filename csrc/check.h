// Baseline only.
#pragma once

#include <stdexcept>
#include <string>

namespace pyargs {

inline void check(bool ok, const char* message) {
  if (!ok) [[unlikely]]
    throw std::runtime_error(std::string("pyargs: ") + message);
}

}  // namespace pyargs
