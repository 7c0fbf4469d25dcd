// The recurrent cells, with torch's gate order and equations. A cell is one struct here and one line in the reference.
//
// The functions are written for any number type F that has + - *, sigmoid(F) and tanh(F): a vector of the CPU, a double, a
// float of the GPU.
//   activate      a unit's pre-activations become its gates' values, from which `backward` starts
//   step          activates the parts, takes c one step on, and gives h
//   kGates        blocks of H rows in weight_ih, weight_hh and the biases
//   kParts        pre-activations of a unit. The input's product gives parts 0 ... kGates, the recurrent one is added to
//                 parts kFirstHidden ... kFirstHidden + kGates: GRU's candidate needs its two sums apart.
//   kReserve      numbers of a unit and a step that are kept for the backward pass: the activated parts, then c
//   input_gate, hidden_gate   the block of rows that the p-th part of either product comes from
#pragma once

#include <cstdint>
#include <cstring>

#include "core/check.h"
#include "core/host_device.h"

namespace pycm {

// i, f, g, o;  c = f c + i g;  h = o tanh(c)
struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kParts = 4, kReserve = 5;
  static constexpr bool kHasMemory = true;  // c
  static constexpr int kFirstHidden = 0;
  PYCM_HOST_DEVICE static constexpr int input_gate(int p) { return p; }
  PYCM_HOST_DEVICE static constexpr int hidden_gate(int p) { return p; }

  template <class F>
  PYCM_HOST_DEVICE static void activate(F (&part)[4]) {
    part[0] = sigmoid(part[0]);
    part[1] = sigmoid(part[1]);
    part[2] = tanh(part[2]);
    part[3] = sigmoid(part[3]);
  }

  template <class F>
  PYCM_HOST_DEVICE static F step(F (&part)[4], F, F& c) {
    activate(part);
    c = part[1] * c + part[0] * part[2];
    return part[3] * tanh(c);
  }

  // From the gradients of h and of c (as the next step sees it) to those of the parts, of c one step earlier, and of h one
  // step earlier so far as it does not pass through the products.
  template <class F>
  PYCM_HOST_DEVICE static void backward(F (&part)[4], F, F c_before, F c, F grad_h, F& grad_c, F& grad_h_before) {
    const F one = F::set(1);
    const F i = part[0], f = part[1], g = part[2], o = part[3], t = tanh(c);
    grad_c = grad_c + grad_h * o * (one - t * t);
    part[0] = grad_c * g * i * (one - i);
    part[1] = grad_c * c_before * f * (one - f);
    part[2] = grad_c * i * (one - g * g);
    part[3] = grad_h * t * o * (one - o);
    grad_c = grad_c * f;
    grad_h_before = F::zero();
  }
};

// r, z, n;  n = tanh(x_n + r h_n);  h = (1 - z) n + z h
struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kParts = 4, kReserve = 4;
  static constexpr bool kHasMemory = false;
  static constexpr int kFirstHidden = 1;  // parts: n of the input, r, z, n of the recurrence
  PYCM_HOST_DEVICE static constexpr int input_gate(int p) { return (p + 2) % 3; }
  PYCM_HOST_DEVICE static constexpr int hidden_gate(int p) { return p; }

  template <class F>
  PYCM_HOST_DEVICE static void activate(F (&part)[4]) {
    part[1] = sigmoid(part[1]);
    part[2] = sigmoid(part[2]);
    part[0] = tanh(part[0] + part[1] * part[3]);
  }

  template <class F>
  PYCM_HOST_DEVICE static F step(F (&part)[4], F h, F&) {
    activate(part);
    return part[0] + part[2] * (h - part[0]);
  }

  template <class F>
  PYCM_HOST_DEVICE static void backward(F (&part)[4], F h_before, F, F, F grad_h, F&, F& grad_h_before) {
    const F one = F::set(1);
    const F n = part[0], r = part[1], z = part[2];
    const F grad_n = grad_h * (one - z) * (one - n * n);
    part[0] = grad_n;
    part[1] = grad_n * part[3] * r * (one - r);
    part[2] = grad_h * (h_before - n) * z * (one - z);
    part[3] = grad_n * r;
    grad_h_before = grad_h * z;
  }
};

enum class Cell : uint8_t { kLstm, kGru };

// Calls `f` with the cell's struct.
template <class F>
decltype(auto) visit(Cell cell, F&& f) {
  return cell == Cell::kLstm ? f(Lstm{}) : f(Gru{});
}

inline const char* name_of(Cell cell) {
  return visit(cell, [](auto c) { return decltype(c)::kName; });
}

inline int gates_of(Cell cell) {
  return visit(cell, [](auto c) { return decltype(c)::kGates; });
}

inline int reserve_of(Cell cell) {
  return visit(cell, [](auto c) { return decltype(c)::kReserve; });
}

inline Cell parse_cell(const char* function, const char* name) {
  for (Cell cell : {Cell::kLstm, Cell::kGru})
    if (std::strcmp(name, name_of(cell)) == 0) return cell;
  throw ValueError(text(function, ": cell must be lstm or gru, got '", name, "'"));
}

}  // namespace pycm
