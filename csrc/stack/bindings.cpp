// pyargs._C.Stack and Cache: what Python sees of csrc/stack. See pyargs/lm/stack/run.py for the contract.

#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "cache.h"
#include "stack.h"
#include "view.h"

namespace py = pybind11;

namespace pyargs::stack {

void bind(py::module_& m) {
  View::to_dlpack = py::object(py::module_::import("torch.utils.dlpack").attr("to_dlpack")).release();
  py::class_<Cache>(m, "Cache")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, py::handle, py::handle>())
      .def("commit", &Cache::commit)
      .def("copy", &Cache::copy)
      .def_readonly("rows", &Cache::rows)
      .def_property("length", [](const Cache& cache) { return cache.length; }, &Cache::set_length);
  py::class_<Stack>(m, "Stack")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float>())
      .def("twin", [](const Stack& stack) { return std::make_unique<Stack>(stack); })
      .def("pack", &Stack::pack)
      .def("bias", &Stack::bias)
      .def("delta", &Stack::delta)
      .def("norms", &Stack::norms)
      .def("embedding", &Stack::embedding)
      .def("forward", &Stack::forward)
      .def("logits", &Stack::logits);
}

}  // namespace pyargs::stack
