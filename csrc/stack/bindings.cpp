// pyargs._C.Stack and Cache: what Python sees of csrc/stack. See pyargs/lm/stack/run.py for the contract.

#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>

#include "../include/pyargs/stack.h"
#include "tensor.h"

namespace py = pybind11;

namespace pyargs::stack {
namespace {

using Optional = std::optional<Tensor>;

std::unique_ptr<Cache> make_cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t rows, py::handle cosine,
                                  py::handle sine) {
  return std::make_unique<Cache>(layers, kv_heads, head_dim, rows, Tensor("cosine", cosine), Tensor("sine", sine));
}

void commit(Cache& cache, py::handle slot, py::handle rows) {
  cache.commit(Tensor("slot", slot), optional_tensor("rows", rows));
}

void pack(Stack& stack, int64_t layer,
          const std::vector<std::tuple<std::string, int64_t, bool, py::object, std::string>>& given) {
  std::vector<Tensor> weights;
  std::vector<Stack::Part> parts;
  for (const auto& [matrix, offset, alternate, weight, block] : given) {
    parts.push_back({matrix, offset, alternate, weights.emplace_back("weight", weight), block});
  }
  const py::gil_scoped_release unlocked;
  stack.pack(layer, parts);
}

void bias(Stack& stack, int64_t layer, const std::string& matrix, py::handle values) {
  stack.bias(layer, matrix, Tensor("bias", values));
}

void delta(Stack& stack, int64_t layer, const std::string& matrix, py::handle a, py::handle b) {
  stack.delta(layer, matrix, Tensor("a", a), Tensor("b", b));
}

void norms(Stack& stack, int64_t layer, py::handle attention, py::handle mlp) {
  stack.norms(layer, Tensor("attention norm", attention), Tensor("mlp norm", mlp));
}

void head_norms(Stack& stack, int64_t layer, py::handle queries, py::handle keys) {
  stack.head_norms(layer, Tensor("norm of queries", queries), Tensor("norm of keys", keys));
}

void embedding(Stack& stack, py::handle embedding, py::handle norm, float scale) {
  const auto owner = std::make_shared<Tensor>("embedding", embedding);
  stack.embedding(*owner, Tensor("norm", norm), owner, scale);
}

void forward(Stack& stack, Cache& cache, py::handle ids, py::handle mask, py::handle rows, py::handle delta,
             bool branches, py::handle states) {
  const Tensor all_ids("ids", ids), all_states("states", states);
  const Optional all_mask = optional_tensor("mask", mask), all_rows = optional_tensor("rows", rows),
                 all_delta = optional_tensor("delta", delta);
  const py::gil_scoped_release unlocked;
  stack.forward(cache, all_ids, all_mask, all_rows, all_delta, branches, all_states);
}

void logits(Stack& stack, py::handle states, int64_t top, py::handle logits) {
  const Tensor all_states("states", states), all_logits("logits", logits);
  const py::gil_scoped_release unlocked;
  stack.logits(all_states, top, all_logits);
}

}  // namespace

void bind(py::module_& m) {
  to_dlpack = py::object(py::module_::import("torch.utils.dlpack").attr("to_dlpack")).release();
  py::class_<Cache>(m, "Cache")
      .def(py::init(&make_cache))
      .def("commit", &commit)
      .def("copy", &Cache::copy)
      .def_property_readonly("rows", &Cache::rows)
      .def_property("length", &Cache::length, &Cache::set_length);
  py::class_<Stack>(m, "Stack")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float,
                    const std::vector<std::string>&>())
      .def("twin", &Stack::twin)
      .def("pack", &pack)
      .def("bias", &bias)
      .def("delta", &delta)
      .def("norms", &norms)
      .def("head_norms", &head_norms)
      .def("attention", &Stack::attention)
      .def("embedding", &embedding)
      .def("forward", &forward)
      .def("logits", &logits);
}

}  // namespace pyargs::stack
