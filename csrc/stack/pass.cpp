// A pass through a decoder stack of the Llama family: each thread of the team runs `forward` once, and they meet after
// every phase. See pyargs/lm/stack/run.py for the contract.

#include "pass.h"

#include <math.h>
#include <sched.h>

#include "../kernels/cpu/capability.h"
#include "gemm.h"
#include "grouped.h"

namespace pyargs {

namespace PYARGS_CPU {
namespace {

using namespace stack;

// A phase's tasks are shared out in stretches, one for each worker: rows of a pass stay in the cache of the core that
// computed them, and weights are read in order. Who is done takes over what others have left, and a phase ends when its
// tasks are done: a thread that comes late, or not at all, holds nobody up. Which thread computes a number does not
// change it.
struct Worker {
  Phase* phase;  // as many as workers; the first one's `done` counts for all
  int64_t id, workers;

  template <class F>
  void run(int64_t tasks, const F& task) {
    int64_t done = 0;
    for (int64_t w = 0; w < workers; ++w) {
      const int64_t share = (id + w) % workers, begin = tasks * share / workers;
      const int64_t count = tasks * (share + 1) / workers - begin;
      int64_t* taken = &phase[share].taken;  // read before it is changed: most shares of others are done by then
      while (__atomic_load_n(taken, __ATOMIC_RELAXED) < count) {
        const int64_t i = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
        if (i >= count) break;
        task(begin + i);
        ++done;
      }
    }
    if (done > 0) __atomic_fetch_add(&phase->done, done, __ATOMIC_RELEASE);
    // After some 20 us the thread that is waited for has most likely lost its core to another process: let that one
    // run.
    for (int spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < tasks; ++spins) {
      if (spins > 1000) {
        sched_yield();
      } else {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      }
    }
    phase += workers;
  }
};

// Calls store(row, column, sums, count) for every row of `rows`, at most kTaskRows, and the `panels` panels side by
// side at `column` of x W^T + bias + delta: count is panels * kPanel. low: [rows, rank], x A^T for those of the rows'
// queries that want the delta; or null.
template <class T, class Store>
void strip(const Matrix& matrix, int panels, const typename T::Element* x, int64_t x_stride, int64_t rows,
           const Query* query, const float* low, int64_t column, const Store& store) {
  const int64_t width = panels * kPanel;
  alignas(64) float sums[kTaskRows * 2 * kPanel];
  for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0.0f;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const char* w =
        static_cast<const char*>(matrix.weight) + (column / kPanel + panel) * panel_bytes(matrix.format, matrix.depth);
    for (int64_t d = 0; d < matrix.depth; d += kTaskDepth) {
      multiply_panel<T>(matrix.format, rows, x + d / T::kValues, x_stride, w + panel_bytes(matrix.format, d),
                        min(kTaskDepth, matrix.depth - d), sums + panel * kPanel, width);
    }
  }
  for (int64_t panel = 0; low && panel < panels; ++panel) {
    const float* b = matrix.b + (column + panel * kPanel) * matrix.rank;
    for (int64_t r = 0, end; r < rows; r = end) {  // the others do not meet it: zero times infinity is no zero
      for (end = r + 1; end < rows && query[end].delta == query[r].delta;) ++end;
      if (!query[r].delta) continue;
      multiply<Float32>(end - r, low + r * matrix.rank, matrix.rank, b, kPanel, matrix.rank,
                        sums + r * width + panel * kPanel, width);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * width;
    for (int64_t i = 0; matrix.bias && i < width; ++i) row[i] += matrix.bias[column + i];
    store(r, column, row, width);
  }
}

// The same for any number of rows and all panels, shared out among the workers.
template <class T, class Store>
void product(Worker& worker, const Matrix& matrix, int panels, const typename T::Element* x, int64_t x_stride,
             int64_t rows, const Query* query, const float* low, const Store& store) {
  const int64_t strips = matrix.columns / (panels * kPanel), parts = (rows + kTaskRows - 1) / kTaskRows;
  worker.run(strips * parts, [&](int64_t task) {
    const int64_t part = task / strips, begin = rows * part / parts, count = rows * (part + 1) / parts - begin;
    strip<T>(matrix, panels, x + begin * x_stride, x_stride, count, query ? query + begin : nullptr,
             low ? low + begin * matrix.rank : nullptr, task % strips * panels * kPanel,
             [&](int64_t r, int64_t column, float* sums, int64_t width) { store(begin + r, column, sums, width); });
  });
}

// x A^T of the queries that want the delta; null if nobody does.
template <class T>
const float* low_rank(Worker& worker, const Pass& pass, const Matrix& matrix, const typename T::Element* x,
                      int64_t x_stride) {
  if (matrix.rank == 0 || !pass.any_delta) return nullptr;
  worker.run(pass.queries, [&](int64_t q) {
    if (!pass.query[q].delta) return;
    const float* row = T::floats(x + q * x_stride, matrix.depth, pass.scratch + worker.id * pass.scratch_size);
    for (int64_t k = 0; k < matrix.rank; ++k) {
      const float* a = matrix.a + k * matrix.depth;
      pass.low[q * matrix.rank + k] = dot(row, a, matrix.depth);
    }
  });
  return pass.low;
}

// out may be x.
void rms_norm(const float* x, const float* __restrict weight, float epsilon, int64_t n, float* out) {
  const float scale = 1.0f / sqrtf(dot(x, x, n) / static_cast<float>(n) + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * scale);
}

inline float silu(float x) {
  const float e = exp2_negative((x < 0.0f ? x : -x) * kLog2E);
  return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

void rotate(float* __restrict x, const float* __restrict cosine, const float* __restrict sine, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosine[i] - b * sine[i];
    x[half + i] = b * cosine[i] + a * sine[i];
  }
}

// Keys and values of one layer and head of a sequence.
struct Head {
  float *keys, *values;
};

inline Head head_of(const Pass& pass, int64_t layer, int64_t row, int64_t kv) {
  const int64_t at = ((layer * pass.rows + row) * pass.kv_heads + kv) * pass.capacity;
  return {pass.keys + at * pass.head_dim, pass.values + at * padded(pass.head_dim)};
}

// Norms and rotates a query's q and k in place and writes k and v to its place.
void write_cache(const Pass& pass, int64_t layer, int64_t q, int64_t stride) {
  const Query& query = pass.query[q];
  const Layer& of = pass.layer[layer];
  const int64_t dim = pass.head_dim, half = dim / 2;
  float* row = pass.qkv + q * stride;
  for (int64_t h = 0; h < pass.heads + pass.kv_heads; ++h) {
    float* head = row + h * dim;
    if (const float* norm = h < pass.heads ? of.q_norm : of.k_norm) rms_norm(head, norm, pass.epsilon, dim, head);
    if (of.rotary) rotate(head, pass.cosine + query.seen * half, pass.sine + query.seen * half, half);
  }
  for (int64_t kv = 0; kv < pass.kv_heads; ++kv) {
    const Head head = head_of(pass, layer, query.row, kv);
    const float* k = row + (pass.heads + kv) * dim;
    float* keys = head.keys + query.place / kPanel * kPanel * dim + query.place % kPanel;
    for (int64_t d = 0; d < dim; ++d) keys[d * kPanel] = k[d];
    std::memcpy(head.values + query.place * padded(dim), k + pass.kv_heads * dim, dim * sizeof(float));
  }
}

// Attention of a group's queries for the heads that share one head of keys and values. Each query starts from itself;
// then come the places before it, kAttentionPlaces at a time, with the sums scaled to the largest score so far. So
// places behind `seen` never enter, wherever the query itself stands; a value there may be NaN, and is not multiplied
// by zero either. What a group's queries attend to is written to `out`, or where values stand in groups to the place of
// the queries themselves.
template <class T>
void attend(const Pass& pass, const Worker& worker, int64_t layer, const Group& group, int64_t kv, int64_t stride,
            typename T::Element* out, int64_t out_stride) {
  const int64_t dim = pass.head_dim, wide = padded(dim), share = pass.heads / pass.kv_heads;
  const int64_t rows = (group.end - group.begin) * share;
  const Head head = head_of(pass, layer, pass.query[group.begin].row, kv);
  float* __restrict queries = pass.scratch + worker.id * pass.scratch_size;
  float* __restrict sums = queries + rows * dim;
  float* __restrict scores = sums + rows * wide;
  float* __restrict top = scores + rows * kAttentionPlaces;
  float* __restrict total = top + rows;

  const float scale = kLog2E * pass.layer[layer].attention_scale;  // powers of 2 are cheaper than those of e
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t q = group.begin + r / share;
    const float* row = pass.qkv + q * stride;
    const float* from = row + (kv * share + r % share) * dim;
    for (int64_t d = 0; d < dim; ++d) queries[r * dim + d] = from[d] * scale;
    top[r] = dot(queries + r * dim, row + (pass.heads + kv) * dim, dim);
    total[r] = 1.0f;
    std::memcpy(sums + r * wide, row + (pass.heads + pass.kv_heads + kv) * dim, dim * sizeof(float));
    for (int64_t d = dim; d < wide; ++d) sums[r * wide + d] = 0.0f;
    longest = max(longest, pass.query[q].seen);
  }
  for (int64_t start = 0; start < longest; start += kAttentionPlaces) {
    const int64_t places = padded(min(kAttentionPlaces, longest - start));
    const auto seen_by = [&](int64_t q) { return max(0, min(places, pass.query[q].seen - start)); };
    for (int64_t r = 0; r < rows; ++r) std::memset(scores + r * kAttentionPlaces, 0, places * sizeof(float));
    for (int64_t t = 0; t < places; t += kPanel) {
      multiply<Float32>(rows, queries, dim, head.keys + (start + t) * dim, kPanel, dim, scores + t, kAttentionPlaces);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = seen_by(group.begin + r / share);
      if (seen == 0) continue;
      float* __restrict score = scores + r * kAttentionPlaces;
      float largest = top[r];
#pragma omp simd reduction(max : largest)
      for (int64_t t = 0; t < seen; ++t) largest = score[t] > largest ? score[t] : largest;
      constexpr int kLanes = 16;
      float lanes[kLanes] = {};
      for (int64_t t = 0; t < places; t += kLanes) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          const float p = exp2_negative(score[t + l] - largest);
          score[t + l] = t + l < seen ? p : 0.0f;
          lanes[l] += score[t + l];
        }
      }
      float sum = 0.0f;
      for (int l = 0; l < kLanes; ++l) sum += lanes[l];
      const float shrink = exp2_negative(top[r] - largest);
      total[r] = total[r] * shrink + sum;
      top[r] = largest;
      for (int64_t d = 0; d < wide; ++d) sums[r * wide + d] *= shrink;
    }
    int64_t common = places;  // places that all queries see
    for (int64_t q = group.begin; q < group.end; ++q) common = min(common, seen_by(q));
    const float* values = head.values + start * wide;
    for (int64_t d = 0; d < wide; d += kPanel) {
      multiply<Float32>(rows, scores, kAttentionPlaces, values + d, wide, common, sums + d, wide);
      for (int64_t r = 0; r < rows; r += share) {
        const int64_t more = seen_by(group.begin + r / share) - common;
        if (more == 0) continue;
        multiply<Float32>(share, scores + r * kAttentionPlaces + common, kAttentionPlaces, values + common * wide + d,
                          wide, more, sums + r * wide + d, wide);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = 1.0f / total[r];
    for (int64_t d = 0; d < dim; ++d) sums[r * wide + d] *= factor;
    const int64_t q = group.begin + r / share, at = (kv * share + r % share) * dim;
    if constexpr (T::kValues == 1) {
      T::put(out + q * out_stride + at, sums + r * wide, dim);
    } else {  // heads may share a group: they are put when all are there
      std::memcpy(pass.qkv + q * stride + at, sums + r * wide, dim * sizeof(float));
    }
  }
}

template <class T>
void forward(const Pass& pass, Worker worker) {
  using Element = typename T::Element;
  auto* x = static_cast<Element*>(pass.x);
  auto* y = static_cast<Element*>(pass.y);
  float* residual = pass.residual;
  const int64_t rows = pass.queries, wide = padded(pass.dim);
  const int64_t x_stride = wide / T::kValues;
  const int64_t y_stride = padded(max(pass.inner, pass.heads * pass.head_dim)) / T::kValues;

  const auto norm = [&](const float* weight) {
    worker.run(rows, [&](int64_t q) {
      float* buffer = pass.scratch + worker.id * pass.scratch_size;
      rms_norm(residual + q * wide, weight, pass.epsilon, pass.dim, buffer);
      buffer[pass.dim] = 0.0f;  // meets a weight of zero, and must be finite
      T::put(x + q * x_stride, buffer, pass.dim + pass.dim % T::kDepth);
    });
  };
  float scale = 1.0f;  // of what a layer adds
  const auto add = [&](int64_t q, int64_t column, const float* sums, int64_t count) {
    float* to = residual + q * wide + column;
    for (int64_t i = 0; i < count; ++i) to[i] += scale * sums[i];
  };

  worker.run(rows, [&](int64_t q) {
    float* to = residual + q * wide;
    const int n = static_cast<int>(pass.dim);
    const float* from = as_floats(pass.embedding_dtype, pass.embedding, pass.query[q].token * pass.dim, n, to);
    for (int i = 0; i < n; ++i) to[i] = pass.embedding_scale * from[i];
  });
  for (int64_t l = 0; l < pass.layers; ++l) {
    const Layer& layer = pass.layer[l];
    const int64_t stride = layer.qkv.columns;
    scale = layer.residual_scale;
    norm(layer.attention_norm);
    const float* low = low_rank<T>(worker, pass, layer.qkv, x, x_stride);
    product<T>(worker, layer.qkv, 1, x, x_stride, rows, pass.query, low,
               [&](int64_t q, int64_t column, const float* sums, int64_t count) {
                 std::memcpy(pass.qkv + q * stride + column, sums, count * sizeof(float));
               });
    worker.run(rows, [&](int64_t q) { write_cache(pass, l, q, stride); });
    worker.run(pass.groups * pass.kv_heads, [&](int64_t task) {
      attend<T>(pass, worker, l, pass.group[task / pass.kv_heads], task % pass.kv_heads, stride, y, y_stride);
    });
    if constexpr (T::kValues > 1) {
      worker.run(rows, [&](int64_t q) { T::put(y + q * y_stride, pass.qkv + q * stride, pass.heads * pass.head_dim); });
    }
    low = low_rank<T>(worker, pass, layer.o, y, y_stride);
    product<T>(worker, layer.o, 1, y, y_stride, rows, pass.query, low, add);

    norm(layer.mlp_norm);
    low = low_rank<T>(worker, pass, layer.gate_up, x, x_stride);
    product<T>(worker, layer.gate_up, 2, x, x_stride, rows, pass.query, low,
               [&](int64_t q, int64_t column, float* __restrict sums, int64_t) {
#pragma omp simd
                 for (int i = 0; i < kPanel; ++i) sums[i] = silu(sums[i]) * sums[kPanel + i];
                 T::put(y + q * y_stride + column / 2 / T::kValues, sums, kPanel);
               });
    low = low_rank<T>(worker, pass, layer.down, y, y_stride);
    product<T>(worker, layer.down, 1, y, y_stride, rows, pass.query, low, add);
  }
  worker.run(rows, [&](int64_t q) {
    rms_norm(residual + q * wide, pass.norm, pass.epsilon, pass.dim, pass.states + pass.query[q].out * pass.dim);
  });
}

// Puts value in its place among the largest, which stand in falling order. NaN has none.
inline void keep_largest(float* best, int64_t count, float value) {
  if (!(value > best[count - 1])) return;
  int64_t at = count - 1;
  for (; at > 0 && value > best[at - 1]; --at) best[at] = best[at - 1];
  best[at] = value;
}

// All logits from the screen, then those again that can be among the `top` largest of their row: where the screen's
// logit plus its error reaches the smallest that `top` of them have for certain.
template <class T>
void project_largest(const Projection& projection, Worker worker, const typename T::Element* x, int64_t wide) {
  const int64_t rows = projection.rows, top = projection.top, vocabulary = projection.vocabulary;
  const int64_t panels = padded(vocabulary) / kPanel, panel_bytes = wide / kGroup * kGroupBytes;
  const float* floats =
      projection.inputs == Format::kFloat32 ? static_cast<const float*>(projection.x) : projection.floats;

  worker.run(panels, [&](int64_t panel) {
    const int64_t column = panel * kPanel, count = min(kPanel, vocabulary - column);
    const float* __restrict error = projection.screen.error + column;
    alignas(64) float sums[kScreenRows * kPanel] = {};
    multiply_screen(rows, floats, wide, projection.screen.panels + panel * panel_bytes, wide, sums);
    for (int64_t row = 0; row < rows; ++row) {
      float* __restrict sum = sums + row * kPanel;
      std::memcpy(projection.logits + row * vocabulary + column, sum, count * sizeof(float));
      const float length = projection.length[row];
      float* best = projection.best + (worker.id * rows + row) * top;
      float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < kPanel; ++i) {
        sum[i] -= length * error[i];
        largest = sum[i] > largest ? sum[i] : largest;
      }
      if (!(largest > best[top - 1])) continue;
      for (int64_t i = 0; i < count; ++i) keep_largest(best, top, sum[i]);
    }
  });

  float least[kScreenRows];
  for (int64_t row = 0; row < rows; ++row) {
    float best[kTop];
    std::memcpy(best, projection.best + row * top, top * sizeof(float));
    for (int64_t w = 1; w < worker.workers; ++w) {
      const float* other = projection.best + (w * rows + row) * top;
      for (int64_t i = 0; i < top; ++i) keep_largest(best, top, other[i]);
    }
    least[row] = best[top - 1];
  }
  worker.run(panels, [&](int64_t panel) {
    const int64_t column = panel * kPanel, count = min(kPanel, vocabulary - column);
    const float* __restrict error = projection.screen.error + column;
    int wanted[kScreenRows], any = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const float* __restrict logits = projection.logits + row * vocabulary + column;
      const float length = projection.length[row], enough = least[row];
      int possible = 0;
#pragma omp simd reduction(| : possible)
      for (int64_t i = 0; i < count; ++i) {
        const float off = length * error[i];  // zero: of a row that has finished, say; NaN: not known
        possible |= off != 0.0f && !(logits[i] + off < enough);
      }
      wanted[row] = possible;
      any |= possible;
    }
    if (!any) return;
    strip<T>(projection.matrix, 1, x, wide, rows, nullptr, nullptr, column,
             [&](int64_t row, int64_t, const float* sums, int64_t) {
               float* logits = projection.logits + row * vocabulary + column;
               if (wanted[row]) std::memcpy(logits, sums, count * sizeof(float));
             });
  });
}

// The length of a state; infinite where sums of squares or products could leave the range of normal numbers.
inline float length_of(const float* x, int64_t n) {
  const float length = sqrtf(dot(x, x, n));
  if (length >= kShortest && length <= kLongest) return length;
  for (int64_t i = 0; i < n; ++i) {
    if (!(x[i] == 0.0f)) return INFINITY;
  }
  return 0.0f;
}

template <class T>
void project(const Projection& projection, Worker worker) {
  auto* x = static_cast<typename T::Element*>(projection.x);
  const int64_t dim = projection.dim, wide = padded(dim), vocabulary = projection.vocabulary;
  const int64_t stride = wide / T::kValues;
  worker.run(projection.rows, [&](int64_t row) {
    typename T::Element* to = x + row * stride;
    T::put(to, projection.states + row * dim, dim);
    if constexpr (T::kValues == 1) {
      for (int64_t i = dim; i < wide; ++i) to[i] = 0;
      if (projection.top > 0)
        projection.length[row] = length_of(T::floats(to, wide, projection.floats + row * wide), wide);
    }
  });
  if constexpr (T::kValues == 1) {
    if (projection.top > 0) return project_largest<T>(projection, worker, x, wide);
  }
  product<T>(worker, projection.matrix, 1, x, stride, projection.rows, nullptr, nullptr,
             [&](int64_t row, int64_t column, const float* sums, int64_t count) {
               std::memcpy(projection.logits + row * vocabulary + column, sums,
                           min(count, vocabulary - column) * sizeof(float));
             });
}

}  // namespace

void run_pass(const Pass& pass, int64_t worker) {
  const Worker with{pass.phase, worker, pass.workers};
  if (pass.inputs == Format::kInt8) return forward<Int8>(pass, with);
  if (pass.inputs == Format::kBFloat16) return forward<BFloat16>(pass, with);
  forward<Float32>(pass, with);
}

void run_projection(const Projection& projection, int64_t worker) {
  const Worker with{projection.phase, worker, projection.workers};
  if (projection.inputs == Format::kInt8) return project<Int8>(projection, with);
  if (projection.inputs == Format::kBFloat16) return project<BFloat16>(projection, with);
  project<Float32>(projection, with);
}

}  // namespace PYARGS_CPU
}  // namespace pyargs
