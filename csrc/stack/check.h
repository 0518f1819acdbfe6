// What an argument is, against what a function wants: errors name the argument. Baseline only.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "../check.h"
#include "../include/pyargs/view.h"

namespace pyargs::stack {

// The view itself, which must have one of the types, and this shape: -1 fits any size.
inline const View& require(const char* name, const View& view, int types, std::initializer_list<int64_t> shape) {
  bool fits = (view.type & types) && view.sizes.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const int64_t wanted = shape.begin()[i];
    fits = wanted < 0 ? view.sizes[i] >= 0 : view.sizes[i] == wanted;
  }
  if (fits) [[likely]]
    return view;
  const auto listed = [](const auto& sizes) {
    std::string text;
    for (int64_t one : sizes) text += (text.empty() ? "" : ", ") + (one < 0 ? "any" : std::to_string(one));
    return "[" + text + "]";
  };
  const auto named = [](int types) {
    std::string text;
    for (const auto& [type, type_name] :
         {std::pair(View::kFloat32, "float32"), std::pair(View::kBFloat16, "bfloat16"),
          std::pair(View::kInt64, "int64"), std::pair(View::kBool, "bool"), std::pair(View::kUInt8, "uint8")}) {
      if (types & type) text += (text.empty() ? "" : " or ") + std::string(type_name);
    }
    return text.empty() ? "another type" : text;
  };
  throw std::runtime_error(std::string("pyargs: ") + name + " must be " + named(types) + " " + listed(shape) +
                           ", dense, on the CPU; got " + named(view.type) + " " + listed(view.sizes));
}

}  // namespace pyargs::stack
