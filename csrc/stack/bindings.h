#pragma once

#include <pybind11/pybind11.h>

namespace pyargs::stack {

// Adds Stack and Cache to pyargs._C.
void bind(pybind11::module_& m);

}  // namespace pyargs::stack
