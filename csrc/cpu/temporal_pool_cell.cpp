#include "cpu/temporal_pool_cell.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>

namespace pycm::cpu {

template <class T>
const RecurrentKernels<T>& recurrent_kernels() {
  constexpr bool kWide = sizeof(T) == 8;
  const auto choose = [](const RecurrentKernels<float>& f32, const RecurrentKernels<double>& f64) -> auto& {
    if constexpr (kWide) return f64;
    else return f32;
  };
#if defined(__x86_64__)
  if (std::strncmp(kernels().level, "avx512", 6) == 0) return choose(recurrent_f32_avx512, recurrent_f64_avx512);
  if (std::strncmp(kernels().level, "avx2", 4) == 0) return choose(recurrent_f32_avx2, recurrent_f64_avx2);
#endif
  return choose(recurrent_f32_scalar, recurrent_f64_scalar);
}
template const RecurrentKernels<float>& recurrent_kernels<float>();
template const RecurrentKernels<double>& recurrent_kernels<double>();

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  if (std::strcmp(kernels().level, "avx512_bf16") == 0) return &recurrent_bf16_avx512;
#endif
  return nullptr;
}

const Int8Kernels& int8_kernels() {
#if defined(__x86_64__)
  const char* level = kernels().level;
  if (std::strcmp(level, "avx512_vnni") == 0 || std::strcmp(level, "avx512_bf16") == 0)
    return recurrent_int8_avx512_vnni;
  if (std::strcmp(level, "avx512") == 0) return recurrent_int8_avx512;
  if (std::strncmp(level, "avx2", 4) == 0) return recurrent_int8_avx2;
#endif
  return recurrent_int8_scalar;
}

constexpr int64_t kHugePage = 2 << 20;

void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const int64_t begin = reinterpret_cast<intptr_t>(data);
  const int64_t first = ceil_div(begin, kHugePage) * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last)
    madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);  // a hint
#else
  (void)data, (void)bytes;
#endif
}

template <class T>
void reserve_large(Buffer<T>& buffer, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if (bytes < kHugePage / 2) return buffer.reserve(count);
  const int64_t whole = ceil_div(bytes, kHugePage) * kHugePage;
  buffer.reserve(whole / static_cast<int64_t>(sizeof(T)), kHugePage);
  use_huge_pages(buffer.get(), whole);
}
template void reserve_large<float>(Buffer<float>&, int64_t);
template void reserve_large<double>(Buffer<double>&, int64_t);

namespace {

// One element of a parameter.
template <class T>
T element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat64: return static_cast<T>(static_cast<const double*>(data)[i]);
    case DType::kFloat16: return float16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::kBFloat16: break;
  }
  return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
}

// Panels of `columns` rows of a matrix [.., dim]; panel p starts at row first(p) and has count(p) of them.
template <class T, class First, class Count>
void pack_matrix(const void* matrix, DType dtype, int64_t dim, int64_t panels, const PackedWeights<T>& into,
                 const Operand<T>& operand, Buffer<T>& out, int num_threads, First first, Count count) {
  const int columns = into.kernels.columns;
  const int64_t words = operand.words(dim), size = words * columns;
  reserve_large(out, panels * size);
  const int threads = threads_for(static_cast<double>(panels * size), 1 << 16, num_threads);
  Buffer<T> rows(threads * columns * words), scratch(threads * Operand<T>::scratch_size(dim));
  parallel_for(panels, threads, [&](int64_t p, int slot) {
    T* block = rows.get() + slot * columns * words;
    T* converted = scratch.get() + slot * Operand<T>::scratch_size(dim);
    const int n = count(p);
    for (int r = 0; r < n; ++r) {
      const void* row = static_cast<const char*>(matrix) + (first(p) + r) * dim * item_size(dtype);
      std::memcpy(block + r * words, operand.read(row, dtype, dim, converted, true),
                  static_cast<size_t>(words) * sizeof(T));
    }
    pack_panel(block, words, n, words, columns, out.get() + p * size);
  });
}

}  // namespace

template <class T>
PackedWeights<T>::PackedWeights(const CellWeights& weights, const Operand<T>& of_input, const Operand<T>& of_states,
                                int num_threads)
    : kernels(recurrent_kernels<T>()), input_operand(of_input), operand(of_states) {
  const int columns = kernels.columns, gates = gates_of(weights.cell);
  const int64_t units = weights.hidden_size, state = weights.state_size;
  groups = ceil_div(units, columns);
  projection_panels = weights.weight_hr == nullptr ? 0 : ceil_div(state, columns);
  const auto count = [=](int64_t p) {
    return static_cast<int>(std::min<int64_t>(columns, units - p / gates * columns));
  };
  visit(weights.cell, [&](auto cell) {
    using C = decltype(cell);
    const auto row = [=](int64_t p, int gate) { return gate * units + p / gates * columns; };
    const auto input_row = [=](int64_t p) { return row(p, C::input_gate(static_cast<int>(p % gates))); };
    const auto hidden_row = [=](int64_t p) { return row(p, C::hidden_gate(static_cast<int>(p % gates))); };
    pack_matrix(weights.weight_ih, weights.dtype, weights.input_size, groups * gates, *this, input_operand, input,
                num_threads, input_row, count);
    pack_matrix(weights.weight_hh, weights.dtype, state, groups * gates, *this, operand, hidden, num_threads,
                hidden_row, count);
    has_bias = weights.bias_ih != nullptr;
    if (!has_bias) return;
    has_hidden_bias = C::kFirstHidden > 0;
    input_bias.reserve(groups * gates * columns);
    hidden_bias.reserve(groups * gates * columns);
    for (int64_t p = 0; p < groups * gates; ++p) {
      const int part = static_cast<int>(p % gates);
      const bool adds_hidden = part >= C::kFirstHidden;    // the input's part takes both biases
      const bool apart = part + C::kFirstHidden >= gates;  // the hidden part takes its own
      for (int j = 0; j < columns; ++j) {
        const bool exists = j < count(p);
        const auto bias = [&](const void* data, int64_t i) {
          return exists ? element<T>(data, weights.dtype, i) : T(0);
        };
        T both = bias(weights.bias_ih, input_row(p) + j);
        if (adds_hidden) both += bias(weights.bias_hh, input_row(p) + j);
        input_bias[p * columns + j] = both;
        hidden_bias[p * columns + j] = apart ? bias(weights.bias_hh, hidden_row(p) + j) : T(0);
      }
    }
  });
  if (weights.weight_hr != nullptr)
    pack_matrix(
        weights.weight_hr, weights.dtype, units, projection_panels, *this, operand, projection, num_threads,
        [=](int64_t p) { return p * columns; },
        [=](int64_t p) { return static_cast<int>(std::min<int64_t>(columns, state - p * columns)); });
}
template struct PackedWeights<float>;
template struct PackedWeights<double>;

std::shared_ptr<const PackedCell> pack_cell(const CellWeights& weights, int num_threads) {
  const DefaultFloatMode float_mode;
  auto packed = std::make_shared<PackedCell>();
  packed->shape = weights;
  packed->shape.weight_ih = packed->shape.weight_hh = packed->shape.bias_ih = packed->shape.bias_hh = nullptr;
  packed->shape.weight_hr = nullptr;
  const auto count = [&](const auto& w, int64_t size) {
    const int64_t gates = gates_of(weights.cell), columns = w.kernels.columns;
    packed->bytes =
        size * columns *
        (w.groups * gates *
             (w.input_operand.words(weights.input_size) + w.operand.words(weights.state_size) + 2 * w.has_bias) +
         w.projection_panels * w.operand.words(weights.hidden_size));
  };
  if (weights.dtype == DType::kFloat64) {
    packed->f64 = std::make_unique<PackedWeights<double>>(weights, Operand<double>(), Operand<double>(), num_threads);
    count(*packed->f64, 8);
  } else {
    const Operand<float> plain(weights.dtype == DType::kBFloat16 ? bf16_kernels() : nullptr);
    packed->f32 = std::make_unique<PackedWeights<float>>(
        weights, plain, weights.int8 ? Operand<float>(int8_kernels()) : plain, num_threads);
    count(*packed->f32, 4);
  }
  return packed;
}

const CellWeights& shape_of(const PackedCell& packed) { return packed.shape; }
int64_t bytes_of(const PackedCell& packed) { return packed.bytes; }

}  // namespace pycm::cpu
