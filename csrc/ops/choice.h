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

// What rows keep, as arguments of an op: pyargs/ops/row_state.py has them by name. Tensors marked "!" are written to.
#define PYARGS_STATE_SCHEMA                                                                                       \
  "Tensor reward_weight, Tensor(a!) finished, Tensor(b!) step, Tensor limit, Tensor(c!) token, Tensor(d!) slot, " \
  "Tensor(e!) chosen, Tensor stop, Tensor(f!)? so_far=None, Tensor(g!)? total=None, Tensor? temperature=None, "   \
  "Tensor? noise=None, Tensor? own_k=None, Tensor? top_p=None, Tensor? min_p=None, Tensor? count=None"
#define PYARGS_STATE_PARAMETERS                                                                             \
  AtenTensorHandle reward_weight, AtenTensorHandle finished, AtenTensorHandle step, AtenTensorHandle limit, \
      AtenTensorHandle token, AtenTensorHandle slot, AtenTensorHandle chosen, AtenTensorHandle stop,        \
      std::optional<AtenTensorHandle> so_far, std::optional<AtenTensorHandle> total,                        \
      std::optional<AtenTensorHandle> temperature, std::optional<AtenTensorHandle> noise,                   \
      std::optional<AtenTensorHandle> own_k, std::optional<AtenTensorHandle> top_p,                         \
      std::optional<AtenTensorHandle> min_p, std::optional<AtenTensorHandle> count
#define PYARGS_STATE_ARGUMENTS                                                                                      \
  reward_weight, finished, step, limit, token, slot, chosen, stop, so_far, total, temperature, noise, own_k, top_p, \
      min_p, count

class State {
 public:
  State(PYARGS_STATE_PARAMETERS)
      : reward_weight_(reward_weight),
        finished_(finished),
        step_(step),
        limit_(limit),
        token_(token),
        slot_(slot),
        chosen_(chosen),
        stop_(Array(stop)),
        so_far_(array_or_none(so_far)),
        total_(array_or_none(total)),
        temperature_(array_or_none(temperature)),
        noise_(array_or_none(noise)),
        own_k_(array_or_none(own_k)),
        top_p_(array_or_none(top_p)),
        min_p_(array_or_none(min_p)),
        count_(array_or_none(count)) {}

#ifdef PYARGS_CUDA_ARCHS
  void check_device(const Array& other) const {
    check_one_device({&other, &reward_weight_, &finished_, &step_, &limit_, &token_, &slot_, &chosen_, given(stop_),
                      given(so_far_), given(total_), given(temperature_), given(noise_), given(own_k_), given(top_p_),
                      given(min_p_), given(count_)});
  }
#endif

  // Checks them and puts them into `rows`, whose k is known.
  void set(ChoiceRows& rows, int64_t batch, int64_t pad_id) {
    const int32_t int64 = aoti_torch_dtype_int64(), float32 = aoti_torch_dtype_float32();
    check(rows.k <= kMaxTopK, "k must be at most 64");
    std::optional<Array> none;
    finished_.require_in_place({batch}, aoti_torch_dtype_bool(), "finished must be [B] bool");
    set_choice(rows, batch, reward_weight_, finished_, stop_, pad_id, std::nullopt, none, count_, none);
    RowState& state = rows.state;
    state.finished = finished_.data<bool>();
    step_.require_in_place({batch}, int64, "step must be [B] int64");
    state.step = step_.data<int64_t>();
    limit_.require({batch}, int64, "limit must be [B] int64");
    state.limit = limit_.data<int64_t>();
    token_.require_in_place({batch}, int64, "token must be [B] int64");
    state.token = token_.data<int64_t>();
    slot_.require_in_place({batch}, int64, "slot must be [B] int64");
    state.slot = slot_.data<int64_t>();
    chosen_.require_in_place({batch, kChosen}, aoti_torch_dtype_float64(), "chosen must be [B, 5] float64");
    state.chosen = chosen_.data<double>();
    if (so_far_) {
      so_far_->require_in_place({batch}, float32, "so_far must be [B] float32");
      state.so_far = so_far_->data<float>();
    }
    if (total_) {
      total_->require_in_place({batch}, float32, "total must be [B] float32");
      state.total = total_->data<float>();
    }
    check(temperature_.has_value() == noise_.has_value(), "temperature and noise belong together");
    if (noise_) {
      temperature_->require({batch}, float32, "temperature must be [B] float32");
      rows.row_temperature = temperature_->data<float>();
      check(noise_->dim() == 2 && noise_->size(1) >= 1, "noise must be [B, N] float32");
      state.noises = noise_->size(1);
      noise_->require({batch, state.noises}, float32, "noise must be [B, N] float32");
      state.noise = noise_->data<float>();
    }
    check(own_k_.has_value() == top_p_.has_value() && own_k_.has_value() == min_p_.has_value(),
          "own_k, top_p and min_p belong together");
    check(!own_k_ || !count_, "own_k and count: give one of them");
    if (own_k_) {
      own_k_->require({batch}, int64, "own_k must be [B] int64");
      top_p_->require({batch}, aoti_torch_dtype_float64(), "top_p must be [B] float64");
      min_p_->require({batch}, aoti_torch_dtype_float64(), "min_p must be [B] float64");
      state.own_k = own_k_->data<int64_t>();
      state.top_p = top_p_->data<double>();
      state.min_p = min_p_->data<double>();
    }
  }

 private:
  Array reward_weight_, finished_, step_, limit_, token_, slot_, chosen_;
  std::optional<Array> stop_, so_far_, total_, temperature_, noise_, own_k_, top_p_, min_p_, count_;
};

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
