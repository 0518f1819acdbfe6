// The arguments and results that ops with a choice of the next token share.
#pragma once

#include <cmath>

#include "../kernels/rows.h"
#include "tensor.h"

namespace pyargs {
namespace {

// Checks the arguments of the choice and puts them into `rows`, which they must outlive.
void set_choice(ChoiceRows& rows, int64_t batch, Array& reward_weight, Array& finished, std::optional<Array>& stop,
                int64_t pad_id, std::optional<double> temperature, std::optional<Array>& uniform) {
  reward_weight.require({batch}, aoti_torch_dtype_float32(), "reward_weight must be [B] float32");
  finished.require({batch}, aoti_torch_dtype_bool(), "finished must be [B] bool");
  if (stop) {
    check(stop->dim() == 1, "stop must be [E] int64");
    stop->require({stop->size(0)}, aoti_torch_dtype_int64(), "stop must be [E] int64");
    rows.stop = stop->data<int64_t>();
    rows.stops = stop->size(0);
  }
  check(temperature.has_value() == uniform.has_value(), "temperature and uniform belong together");
  if (uniform) {
    check(*temperature > 0.0 && *temperature < INFINITY, "temperature must be > 0 and finite");
    uniform->require({batch}, aoti_torch_dtype_float32(), "uniform must be [B] float32");
    rows.uniform = uniform->data<float>();
    rows.temperature = *temperature;
  }
  rows.reward_weight = reward_weight.data<float>();
  rows.finished = finished.data<bool>();
  rows.pad_id = pad_id;
}

// New tensors for the choice of each row.
class ChoiceResults {
 public:
  ChoiceResults(ChoiceRows& rows, int64_t batch, const Array& like)
      : token_({batch}, aoti_torch_dtype_int64(), like),
        slot_({batch}, aoti_torch_dtype_int64(), like),
        reward_({batch, rows.k}, aoti_torch_dtype_float32(), like),
        finished_({batch}, aoti_torch_dtype_bool(), like) {
    rows.token = token_.data<int64_t>();
    rows.slot = slot_.data<int64_t>();
    rows.reward = reward_.data<float>();
    rows.finished_out = finished_.data<bool>();
  }

  std::tuple<StableIValue, StableIValue, StableIValue, StableIValue> release() {
    return {token_.release(), slot_.release(), reward_.release(), finished_.release()};
  }

 private:
  Result token_, slot_, reward_, finished_;
};

}  // namespace
}  // namespace pyargs
