// The threads of the extension, torch's.
#pragma once

#include <cstdint>

namespace pyargs {

// From now on at most so many work, however many torch has.
void limit_threads(int64_t threads);

}  // namespace pyargs
