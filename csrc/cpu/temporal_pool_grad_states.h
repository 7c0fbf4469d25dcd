// The gradient that pooling hands to the states of one row.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/temporal_pool_kernels.h"
#include "ops/temporal_pool.h"

namespace pycm::cpu {

// One row's states and the gradients of them, in time order; `last` and `first` are times.
template <class T>
struct PooledRow {
  const T* states;
  int64_t length, dim, first, last;
  const T* grad_out;  // [kWidth][dim]
  T* grad_states;     // [length][grad_stride], added to
  int64_t grad_stride;
  const T* weights;  // of attention [dim] or gpo [length]
  T* grad_weights;   // the row's share, overwritten: attention [dim], gpo [length]; may be null
};

// The first time at which each element is greatest; a NaN counts as that.
template <class T>
void max_back(const PooledRow<T>& row, const T* grad) {
  for (int64_t d = 0; d < row.dim; ++d) {
    int64_t best = 0;
    for (int64_t t = 0; t < row.length; ++t) {
      const T value = row.states[t * row.dim + d];
      if (std::isnan(value)) {
        best = t;
        break;
      }
      if (value > row.states[best * row.dim + d]) best = t;
    }
    row.grad_states[best * row.grad_stride + d] += grad[d];
  }
}

// a = softmax(w . h_t), out = sum of a_t h_t
template <class T>
void attention_back(const PooledRow<T>& row, const RecurrentKernels<T>& kernels) {
  std::vector<T> a(static_cast<size_t>(row.length)), grad(static_cast<size_t>(row.length));
  const auto state = [&](size_t t) { return row.states + static_cast<int64_t>(t) * row.dim; };
  for (size_t t = 0; t < a.size(); ++t) a[t] = kernels.dot(row.weights, state(t), row.dim);
  const T largest = *std::max_element(a.begin(), a.end());
  T sum = 0, mean = 0;
  for (T& value : a) sum += value = std::exp(value - largest);
  for (size_t t = 0; t < a.size(); ++t) {
    a[t] /= sum;
    grad[t] = kernels.dot(row.grad_out, state(t), row.dim);
    mean += a[t] * grad[t];
  }
  if (row.grad_weights != nullptr) std::fill_n(row.grad_weights, row.dim, T(0));
  for (size_t t = 0; t < a.size(); ++t) {
    const T score = a[t] * (grad[t] - mean);
    T* out = row.grad_states + static_cast<int64_t>(t) * row.grad_stride;
    kernels.axpy(a[t], row.grad_out, out, row.dim);
    kernels.axpy(score, row.weights, out, row.dim);
    if (row.grad_weights != nullptr) kernels.axpy(score, state(t), row.grad_weights, row.dim);
  }
}

// Equal values keep the order of time.
template <class T>
void gpo_back(const PooledRow<T>& row) {
  std::vector<int64_t> order(static_cast<size_t>(row.length));
  if (row.grad_weights != nullptr) std::fill_n(row.grad_weights, row.length, T(0));
  for (int64_t d = 0; d < row.dim; ++d) {
    const T* column = row.states + d;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return column[a * row.dim] > column[b * row.dim] ||
             (std::isnan(column[a * row.dim]) && !std::isnan(column[b * row.dim]));
    });
    for (int64_t k = 0; k < row.length; ++k) {
      const int64_t t = order[static_cast<size_t>(k)];
      row.grad_states[t * row.grad_stride + d] += row.weights[k] * row.grad_out[d];
      if (row.grad_weights != nullptr) row.grad_weights[k] += row.grad_out[d] * column[t * row.dim];
    }
  }
}

template <class T>
void pool_back(Pool pool, const PooledRow<T>& row, const RecurrentKernels<T>& kernels) {
  const auto add_at = [&](int64_t t, const T* grad) {
    kernels.axpy(1, grad, row.grad_states + t * row.grad_stride, row.dim);
  };
  const auto add_mean = [&](const T* grad) {
    for (int64_t t = 0; t < row.length; ++t)
      kernels.axpy(T(1) / static_cast<T>(row.length), grad, row.grad_states + t * row.grad_stride, row.dim);
  };
  const T *grad = row.grad_out, *second = row.grad_out + row.dim;
  switch (pool) {
    case Pool::kNone: return;
    case Pool::kLast: return add_at(row.last, grad);
    case Pool::kFirst: return add_at(row.first, grad);
    case Pool::kMean: return add_mean(grad);
    case Pool::kMax: return max_back(row, grad);
    case Pool::kMeanMax: return add_mean(grad), max_back(row, second);
    case Pool::kLastMean: return add_at(row.last, grad), add_mean(second);
    case Pool::kAttention: return attention_back(row, kernels);
    case Pool::kGpo: return gpo_back(row);
  }
}

}  // namespace pycm::cpu
