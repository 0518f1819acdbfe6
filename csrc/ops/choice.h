// The arguments and results that ops with a choice of the next token share.
#pragma once

#include <cmath>

#include "../kernels/rows.h"
#include "tensor.h"

namespace pyargs {
namespace {

// Checks the arguments of the choice and puts them into `rows`, which they must outlive.
void set_choice(ChoiceRows& rows, int64_t batch, Array& reward_weight, Array& finished, std::optional<Array>& stop,
                int64_t pad_id, std::optional<double> temperature, std::optional<Array>& uniform,
                std::optional<Array>& count, std::optional<Array>& row_temperature) {
  reward_weight.require({batch}, aoti_torch_dtype_float32(), "reward_weight must be [B] float32");
  finished.require({batch}, aoti_torch_dtype_bool(), "finished must be [B] bool");
  if (stop) {
    const char* message = "stop must be [E] or [B, E] int64";
    check(stop->dim() == 1 || stop->dim() == 2, message);
    rows.stops = stop->size(stop->dim() - 1);
    if (stop->dim() == 1) {
      stop->require({rows.stops}, aoti_torch_dtype_int64(), message);
    } else {
      stop->require({batch, rows.stops}, aoti_torch_dtype_int64(), message);
      rows.stop_stride = rows.stops;
    }
    rows.stop = stop->data<int64_t>();
  }
  if (count) {
    count->require({batch}, aoti_torch_dtype_int64(), "count must be [B] int64");
    rows.count = count->data<int64_t>();
  }
  check((temperature.has_value() || row_temperature.has_value()) == uniform.has_value(),
        "temperature and uniform belong together");
  check(!temperature || !row_temperature, "temperature is one number or one for each row");
  if (uniform) {
    uniform->require({batch}, aoti_torch_dtype_float32(), "uniform must be [B] float32");
    rows.uniform = uniform->data<float>();
  }
  if (temperature) {
    check(*temperature > 0.0 && *temperature < INFINITY, "temperature must be > 0 and finite");
    rows.temperature = *temperature;
  }
  if (row_temperature) {
    row_temperature->require({batch}, aoti_torch_dtype_float32(), "temperature must be [B] float32");
    rows.row_temperature = row_temperature->data<float>();
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
