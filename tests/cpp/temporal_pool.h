// temporal_pool against the equations of the cells in plain loops, and its gradient against differences of itself.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "harness.h"
#include "ops/temporal_pool.h"

namespace pycm::test {

struct PoolCase {
  Cell cell;
  Pool pool;
  int64_t inputs, units, projection;  // 0: none
  std::vector<int64_t> lengths;
  bool reverse, padded, start;  // start: with h0 and c0
  int threads;
  int64_t states() const { return projection > 0 ? projection : units; }
  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
};

inline std::vector<double> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = normal(generator);
  return values;
}

// Everything the result depends on, one vector each.
enum PoolInput { kX, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr, kH0, kC0, kPoolWeights, kPoolInputs };

struct PoolData {
  std::vector<int64_t> offsets{0};
  std::vector<double> input[kPoolInputs];

  explicit PoolData(const PoolCase& p) {
    for (int64_t length : p.lengths) offsets.push_back(offsets.back() + length);
    const int64_t rows = gates_of(p.cell) * p.units, steps = offsets.back();
    const double scale = 1 / std::sqrt(static_cast<double>(p.units));
    input[kX] = random_values(steps * p.inputs, 1);
    input[kWeightIh] = random_values(rows * p.inputs, scale);
    input[kWeightHh] = random_values(rows * p.states(), scale);
    input[kBiasIh] = random_values(rows, scale);
    input[kBiasHh] = random_values(rows, scale);
    if (p.projection > 0) input[kWeightHr] = random_values(p.projection * p.units, scale);
    if (p.start) input[kH0] = random_values(p.batch() * p.states(), 1);
    if (p.start && p.cell == Cell::kLstm) input[kC0] = random_values(p.batch() * p.units, 1);
    if (p.pool == Pool::kAttention) input[kPoolWeights] = random_values(p.states(), 1);
    if (p.pool == Pool::kGpo) input[kPoolWeights] = random_values(steps, 1);
  }
};

// What a row is in 8 bits: its largest value is 127.
inline std::vector<double> rounded_to_int8(const double* row, int64_t dim) {
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(static_cast<float>(row[d])));
  std::vector<double> values(row, row + dim);
  for (double& value : values)
    value = largest == 0 ? 0 : std::nearbyintf(static_cast<float>(value) * (127 / largest)) * (largest / 127);
  return values;
}

// Row b's states in the order of processing, from the equations; int8: states and what multiplies them in 8 bits.
inline std::vector<std::vector<double>> plain_states(const PoolCase& p, const PoolData& data, int64_t b, bool int8) {
  const auto product = [=](const double* x, const double* y, int64_t dim, bool input = false) {
    if (!int8 || input) return std::inner_product(x, x + dim, y, 0.0);
    const std::vector<double> weights = rounded_to_int8(x, dim), values = rounded_to_int8(y, dim);
    return std::inner_product(weights.begin(), weights.end(), values.begin(), 0.0);
  };
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const int64_t n = p.states();
  std::vector<double> h(static_cast<size_t>(n)), c(static_cast<size_t>(p.units));
  if (p.start)
    for (int64_t d = 0; d < n; ++d) h[d] = data.input[kH0][b * n + d];
  if (p.start && p.cell == Cell::kLstm)
    for (int64_t d = 0; d < p.units; ++d) c[d] = data.input[kC0][b * p.units + d];
  std::vector<std::vector<double>> states;
  for (int64_t t = 0; t < p.lengths[b]; ++t) {
    const int64_t step = data.offsets[b] + (p.reverse ? p.lengths[b] - 1 - t : t);
    const auto sum = [&](int64_t gate, int64_t u, bool input) {
      const int64_t row = gate * p.units + u, dim = input ? p.inputs : n;
      const double* w = data.input[input ? kWeightIh : kWeightHh].data() + row * dim;
      const double* v = input ? data.input[kX].data() + step * dim : h.data();
      return data.input[input ? kBiasIh : kBiasHh][row] + product(w, v, dim, input);
    };
    const auto both = [&](int64_t gate, int64_t u) { return sum(gate, u, true) + sum(gate, u, false); };
    std::vector<double> next(static_cast<size_t>(p.units));
    for (int64_t u = 0; u < p.units; ++u) {
      if (p.cell == Cell::kLstm) {
        c[u] = sigmoid(both(1, u)) * c[u] + sigmoid(both(0, u)) * std::tanh(both(2, u));
        next[u] = sigmoid(both(3, u)) * std::tanh(c[u]);
      } else {
        const double candidate = std::tanh(sum(2, u, true) + sigmoid(both(0, u)) * sum(2, u, false));
        const double z = sigmoid(both(1, u));
        next[u] = (1 - z) * candidate + z * h[u];
      }
    }
    if (p.projection > 0) {
      std::vector<double> projected(static_cast<size_t>(n));
      for (int64_t d = 0; d < n; ++d)
        projected[d] = product(data.input[kWeightHr].data() + d * p.units, next.data(), p.units);
      next = projected;
    }
    states.push_back(h = next);
  }
  return states;
}

inline std::vector<double> plain_pool(const PoolCase& p, const PoolData& data, int64_t b, bool int8) {
  const std::vector<std::vector<double>> states = plain_states(p, data, b, int8);
  std::vector<double> out(static_cast<size_t>(width_of(p.pool) * p.states()));
  if (states.empty()) return out;
  std::vector<double> softmax(states.size());
  double sum = 0;
  if (p.pool == Pool::kAttention)
    for (size_t t = 0; t < states.size(); ++t) {
      double score = 0;
      for (size_t d = 0; d < states[t].size(); ++d) score += data.input[kPoolWeights][d] * states[t][d];
      sum += softmax[t] = std::exp(score);
    }
  for (size_t d = 0; d < states[0].size(); ++d) {
    std::vector<double> values;
    for (const auto& h : states) values.push_back(h[d]);
    double mean = 0, weighted = 0;
    for (double value : values) mean += value / static_cast<double>(values.size());
    const double greatest = *std::max_element(values.begin(), values.end());
    const size_t second = d + states[0].size();
    for (size_t t = 0; t < values.size(); ++t) weighted += softmax[t] / sum * values[t];
    switch (p.pool) {
      case Pool::kNone: break;
      case Pool::kLast: out[d] = values.back(); break;
      case Pool::kFirst: out[d] = values.front(); break;
      case Pool::kMean: out[d] = mean; break;
      case Pool::kMax: out[d] = greatest; break;
      case Pool::kMeanMax: out[d] = mean, out[second] = greatest; break;
      case Pool::kLastMean: out[d] = values.back(), out[second] = mean; break;
      case Pool::kAttention: out[d] = weighted; break;
      case Pool::kGpo:
        std::sort(values.begin(), values.end(), [](double x, double y) { return x > y; });
        for (size_t t = 0; t < values.size(); ++t)
          out[d] += data.input[kPoolWeights][static_cast<size_t>(data.offsets[b]) + t] * values[t];
        break;
    }
  }
  return out;
}

inline uint16_t to_bfloat16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The data as T, x ragged or padded with NaN, behind the arguments of both passes; x and the weights in bf16 for `half`;
// products of 8 bits for `int8`.
template <class T>
struct PoolCall {
  std::vector<T> input[kPoolInputs], x;
  std::vector<uint16_t> halves[kPoolInputs];
  CellWeights weights;
  TemporalPoolArgs args;
  std::vector<T> out, states, reserve;

  PoolCall(const PoolCase& p, const PoolData& data, bool half = false, bool int8 = false) {
    for (int i = 0; i < kPoolInputs; ++i) input[i].assign(data.input[i].begin(), data.input[i].end());
    const DType dtype = half ? DType::kBFloat16 : sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    const int64_t longest = *std::max_element(p.lengths.begin(), p.lengths.end());
    x = input[kX];
    if (p.padded) {
      x.assign(static_cast<size_t>(p.batch() * longest * p.inputs), std::nan(""));
      for (int64_t b = 0; b < p.batch(); ++b)
        std::copy_n(input[kX].begin() + data.offsets[b] * p.inputs, p.lengths[b] * p.inputs,
                    x.begin() + b * longest * p.inputs);
    }
    const auto pointer = [](std::vector<T>& values) { return values.empty() ? nullptr : values.data(); };
    const auto given = [&](int i) -> const void* {
      const std::vector<T>& values = i == kX ? x : input[i];
      if (!half || values.empty()) return values.empty() ? nullptr : values.data();
      for (T value : values) halves[i].push_back(to_bfloat16(value));
      return halves[i].data();
    };
    weights = {p.cell,           dtype,          p.inputs,       p.units,          p.states(), given(kWeightIh),
               given(kWeightHh), given(kBiasIh), given(kBiasHh), given(kWeightHr), int8};
    args.x = {given(kX), dtype, p.batch(), data.offsets.data(), p.inputs, p.padded, longest * p.inputs};
    args.reverse = p.reverse;
    args.pool = {p.pool, pointer(input[kPoolWeights])};
    args.h0 = pointer(input[kH0]);
    args.c0 = pointer(input[kC0]);
    out.assign(static_cast<size_t>(p.batch() * width_of(p.pool) * p.states()), std::nan(""));
    states.assign(static_cast<size_t>(data.offsets.back() * p.states()), std::nan(""));
    reserve.assign(static_cast<size_t>(data.offsets.back() * reserve_of(p.cell) * p.units), std::nan(""));
    args.out = pointer(out);
    args.states = states.data();
    args.reserve = reserve.data();
    args.num_threads = p.threads;
    cpu::temporal_pool(*cpu::pack_cell(weights, p.threads), args);
  }
};

template <class T>
void test_pool_values(const PoolCase& p, const PoolData& data, const std::string& what, bool int8 = false) {
  const PoolCall<T> call(p, data, false, int8);
  double error = 0;
  for (int64_t b = 0; b < p.batch(); ++b) {
    const std::vector<double> want = plain_pool(p, data, b, int8);
    for (size_t i = 0; i < want.size(); ++i) {
      const double difference = std::fabs(call.out[b * want.size() + i] - want[i]);
      error = difference <= error ? error : difference;  // NaN stays
    }
  }
  report(error < (sizeof(T) == 8 ? 1e-12 : 3e-5), what + ": error " + std::to_string(error));
}

// Of the sum of out times grad_out: one vector for each input, and that of x padded as x is.
template <class T>
std::vector<std::vector<T>> pool_gradients(const PoolCase& p, const PoolData& data, const PoolCall<T>& call,
                                           const std::vector<T>& grad_out) {
  TemporalPoolGradArgs args;
  args.weights = call.weights;
  args.x = call.args.x;
  args.reverse = p.reverse;
  args.pool = call.args.pool;
  args.h0 = call.args.h0;
  args.c0 = call.args.c0;
  args.states = call.states.data();
  args.reserve = call.reserve.data();
  args.grad_out = grad_out.data();
  args.num_threads = p.threads;
  std::vector<std::vector<T>> grad(kPoolInputs);
  for (int i = 0; i < kPoolInputs; ++i) grad[i].assign(data.input[i].size(), std::nan(""));
  grad[kX].assign(call.x.size(), std::nan(""));
  args.grad_x = grad[kX].data();
  args.grad_x_step_stride = args.x.step_stride;
  args.grad_x_batch_stride = args.x.batch_stride;
  void** outputs[] = {nullptr,
                      &args.grad_weight_ih,
                      &args.grad_weight_hh,
                      &args.grad_bias_ih,
                      &args.grad_bias_hh,
                      &args.grad_weight_hr,
                      &args.grad_h0,
                      &args.grad_c0,
                      &args.grad_pool_weights};
  for (int i = 1; i < kPoolInputs; ++i)
    if (!grad[i].empty()) *outputs[i] = grad[i].data();
  cpu::temporal_pool_backward(args);
  return grad;
}

// x and the weights in bf16, against the same values in fp64: where operands are rounded, by 2^-9 of themselves.
inline void test_pool_half(const PoolCase& p, PoolData data, const std::string& what) {
  for (int i = kX; i <= kWeightHr; ++i)
    for (double& value : data.input[i]) value = bfloat16_to_float(to_bfloat16(value));
  const PoolCall<double> wide(p, data);
  const PoolCall<float> narrow(p, data, true);
  const std::vector<double> grad_out = random_values(static_cast<int64_t>(wide.out.size()), 1);
  const auto want = pool_gradients(p, data, wide, grad_out);
  const auto found = pool_gradients(p, data, narrow, std::vector<float>(grad_out.begin(), grad_out.end()));
  for (size_t i = 0; i < want.size(); ++i) {
    double error = 0, size = 0;
    for (size_t d = 0; d < want[i].size(); ++d) {
      if (std::isnan(want[i][d]) && std::isnan(found[i][d])) continue;  // padding
      error += (want[i][d] - found[i][d]) * (want[i][d] - found[i][d]);
      size += want[i][d] * want[i][d];
    }
    report(std::sqrt(error) <= 0.01 * std::sqrt(size), what + " bfloat16 gradient of input " + std::to_string(i) +
                                                           ": error " + std::to_string(std::sqrt(error / size)));
  }
}

// The sum of out times random weights, along a random direction of every input.
inline void test_pool_gradient(const PoolCase& p, const PoolData& data, const std::string& what) {
  const PoolCall<double> call(p, data);
  const std::vector<double> grad_out = random_values(static_cast<int64_t>(call.out.size()), 1);
  const auto grad = pool_gradients(p, data, call, grad_out);
  for (int i = 0; i < kPoolInputs; ++i) {
    if (data.input[i].empty()) continue;
    const std::vector<double> direction = random_values(static_cast<int64_t>(data.input[i].size()), 1);
    constexpr double kStep = 1e-7;
    double value[2] = {}, expected = 0;
    for (int side = 0; side < 2; ++side) {
      PoolData moved = data;
      for (size_t d = 0; d < direction.size(); ++d) moved.input[i][d] += (side == 0 ? -kStep : kStep) * direction[d];
      const PoolCall<double> other(p, moved);
      for (size_t d = 0; d < grad_out.size(); ++d) value[side] += grad_out[d] * other.out[d];
    }
    size_t at = 0;
    for (int64_t b = 0; b < p.batch(); ++b)
      for (int64_t d = 0; i == kX && d < p.lengths[b] * p.inputs; ++d, ++at)
        expected +=
            direction[at] * grad[kX][(p.padded ? b * call.args.x.batch_stride : data.offsets[b] * p.inputs) + d];
    for (size_t d = 0; i != kX && d < direction.size(); ++d) expected += direction[d] * grad[i][d];
    const double difference = (value[1] - value[0]) / (2 * kStep);
    report(std::fabs(difference - expected) < 1e-5 * (1 + std::fabs(expected)),
           what + " gradient of input " + std::to_string(i) + ": got " + std::to_string(expected) +
               ", differences give " + std::to_string(difference));
  }
}

// One step, as a state that is off by a rounding may become another code.
inline void test_pool_int8(PoolCase p, const std::string& what) {
  for (int64_t& length : p.lengths) length = std::min<int64_t>(length, 1);
  test_pool_values<float>(p, PoolData(p), what + " int8", true);
}

inline void test_pool_case(const PoolCase& p, const std::string& level) {
  const PoolData data(p);
  const std::string what = "temporal_pool " + level + " " + name_of(p.cell) + " " + name_of(p.pool) + " batch " +
                           std::to_string(p.lengths.size()) + " units " + std::to_string(p.units);
  test_pool_values<float>(p, data, what + " float32");
  test_pool_values<double>(p, data, what + " float64");
  test_pool_gradient(p, data, what);
  test_pool_int8(p, what);
  if (p.pool == Pool::kMean || p.pool == Pool::kLastMean) test_pool_half(p, data, what);  // others choose by value
}

// Differences fail where sorted values cross, so the numbers are the same at every level and on every machine.
inline void test_temporal_pool(const std::string& level) {
  const std::mt19937_64 saved = generator;
  generator.seed(42);
  const std::vector<int64_t> batches[] = {
      {1}, {5, 0, 3, 5, 1}, {2, 9, 1, 4, 4, 7, 3, 9, 0, 8, 6, 2, 5, 9, 1, 3, 7, 4, 2}};
  int turn = 0;
  for (Cell cell : {Cell::kLstm, Cell::kGru})
    for (Pool pool : kPools)
      for (const std::vector<int64_t>& lengths : batches) {
        ++turn;
        if (pool == Pool::kNone) continue;
        PoolCase p{cell,    pool,          1 + turn % 7 * 5, 1 + turn % 5 * 9, 0,
                   lengths, turn % 2 == 0, turn % 3 == 0,    turn % 4 < 2,     1 + turn % 3};
        if (cell == Cell::kLstm && turn % 4 == 3) p.projection = 1 + p.units / 2;
        test_pool_case(p, level);
      }
  // Threads share the units of every step; more steps than one block of the weights' gradients.
  test_pool_case({Cell::kLstm, Pool::kAttention, 3, 136, 0, {130, 1, 128}, false, true, true, 3}, level);
  test_pool_case({Cell::kLstm, Pool::kLastMean, 3, 136, 100, {130, 1, 128}, true, false, false, 2}, level);
  test_pool_case({Cell::kGru, Pool::kAttention, 3, 136, 0, {130, 1, 128}, true, false, true, 3}, level);
  generator = saved;
}

}  // namespace pycm::test
