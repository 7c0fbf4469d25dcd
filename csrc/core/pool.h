// The poolings of a sequence's states h_0 ... h_{L-1}, in the order of processing. A pooling is one struct here and one line in
// the reference. Those whose result grows state by state say how, element by element; the others need all states of a row:
//   kWidth     results per state element: meanmax gives [mean | max], lastmean [last | mean]
//   kStreams   start: the first state makes the running value of part `p`;  add: each later one changes it;
//              finish: what the running value becomes after `length` states
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "core/check.h"
#include "core/host_device.h"

namespace pycm {

struct NoPool {
  static constexpr const char* kName = "none";
  static constexpr int kWidth = 0;
  static constexpr bool kStreams = false;
};

struct LastPool {
  static constexpr const char* kName = "last";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = true, kMean[] = {false};
  template <class F>
  PYCM_HOST_DEVICE static F add(int, F, F h) {
    return h;
  }
};

struct FirstPool {
  static constexpr const char* kName = "first";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = true, kMean[] = {false};
  template <class F>
  PYCM_HOST_DEVICE static F add(int, F value, F) {
    return value;
  }
};

struct MeanPool {
  static constexpr const char* kName = "mean";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = true, kMean[] = {true};
  template <class F>
  PYCM_HOST_DEVICE static F add(int, F value, F h) {
    return value + h;
  }
};

template <class T>
constexpr T kMost = std::numeric_limits<T>::max();

// The greater one; NaN where either is. (max(a, b) is a where either is NaN.)
template <class F>
PYCM_HOST_DEVICE F greatest(F h, F value) {
  const F limit = F::set(kMost<typename F::T>);
  const F finite = least(max(value, F::zero() - limit), limit);
  return max(h, value) + (finite - finite);
}

struct MaxPool {
  static constexpr const char* kName = "max";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = true, kMean[] = {false};
  template <class F>
  PYCM_HOST_DEVICE static F add(int, F value, F h) {
    return greatest(h, value);
  }
};

struct MeanMaxPool {
  static constexpr const char* kName = "meanmax";
  static constexpr int kWidth = 2;
  static constexpr bool kStreams = true, kMean[] = {true, false};
  template <class F>
  PYCM_HOST_DEVICE static F add(int p, F value, F h) {
    return p == 0 ? value + h : greatest(h, value);
  }
};

struct LastMeanPool {
  static constexpr const char* kName = "lastmean";
  static constexpr int kWidth = 2;
  static constexpr bool kStreams = true, kMean[] = {false, true};
  template <class F>
  PYCM_HOST_DEVICE static F add(int p, F value, F h) {
    return p == 0 ? h : value + h;
  }
};

// softmax over t of (w . h_t), then the weighted sum.
struct AttentionPool {
  static constexpr const char* kName = "attention";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = false;
};

// Generalised pooling (VSE-infinity): each element's values are sorted over time, greatest first, and weighted by position.
struct GpoPool {
  static constexpr const char* kName = "gpo";
  static constexpr int kWidth = 1;
  static constexpr bool kStreams = false;
};

enum class Pool : uint8_t { kNone, kLast, kFirst, kMean, kMax, kMeanMax, kLastMean, kAttention, kGpo };
constexpr Pool kPools[] = {Pool::kNone,    Pool::kLast,     Pool::kFirst,     Pool::kMean, Pool::kMax,
                           Pool::kMeanMax, Pool::kLastMean, Pool::kAttention, Pool::kGpo};

// Calls `f` with the pooling's struct.
template <class F>
decltype(auto) visit(Pool pool, F&& f) {
  switch (pool) {
    case Pool::kNone: return f(NoPool{});
    case Pool::kLast: return f(LastPool{});
    case Pool::kFirst: return f(FirstPool{});
    case Pool::kMean: return f(MeanPool{});
    case Pool::kMax: return f(MaxPool{});
    case Pool::kMeanMax: return f(MeanMaxPool{});
    case Pool::kLastMean: return f(LastMeanPool{});
    case Pool::kAttention: return f(AttentionPool{});
    case Pool::kGpo: break;
  }
  return f(GpoPool{});
}

inline const char* name_of(Pool pool) {
  return visit(pool, [](auto p) { return decltype(p)::kName; });
}

inline int width_of(Pool pool) {
  return visit(pool, [](auto p) { return decltype(p)::kWidth; });
}

inline Pool parse_pool(const char* function, const char* name) {
  std::string names;
  for (Pool pool : kPools) {
    if (std::strcmp(name, name_of(pool)) == 0) return pool;
    names += (names.empty() ? "" : ", ") + std::string(name_of(pool));
  }
  throw ValueError(text(function, ": pool must be one of ", names, ", got '", name, "'"));
}

}  // namespace pycm
