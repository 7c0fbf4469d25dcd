// What topk keeps while it works on a chunk of queries.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/matches.h"
#include "cpu/search.h"

namespace pycm::cpu {

constexpr int64_t kListBytes = 128 << 20;
constexpr int64_t kMaxChunk = 2048;
// A list is cut down when it is full, which costs verifications.
inline int64_t candidate_capacity(int64_t k) { return 2 * k + 64 + std::min<int64_t>(2 * k, 512); }

// What is kept for one query: candidates by each thread, and verified matches by all (counted for each here).
inline int64_t list_bytes(int64_t k) {
  return candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)) + 8 +
         BestMatches::capacity(k) * static_cast<int64_t>(sizeof(Match)) + static_cast<int64_t>(sizeof(BestMatches));
}

// Queries that are worked on at once.
inline int64_t chunk_rows(int64_t queries, int64_t k, int threads) {
  const int64_t fit = kListBytes / (list_bytes(k) * threads) / kMaxTileRows * kMaxTileRows;
  return std::min(queries, std::clamp<int64_t>(fit, kMaxTileRows, kMaxChunk));
}

// What the chunks of a search take.
inline int64_t chunk_workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
  // The chunk's lists and packed rows; per thread a block, encoded in four bytes an element at most, and the survivors of the
  // query it finishes; for all threads the pairs of grouped_pairs.h and their queries in fp64.
  const int64_t chunk = chunk_rows(queries, k, num_threads), threads = num_threads;
  const int64_t rows = threads * chunk * list_bytes(k) + (chunk + kMaxTileRows) * (dim * 8 + 128);
  const int64_t block = (block_rows<float>((dim + 3) / 4) + 3 * kMaxTileColumns) * (dim + 16) * 8;
  const int64_t survivors = threads * candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)) + list_bytes(k);
  const int64_t grouped =
      threads * chunk * candidate_capacity(k) * 40 + std::min(chunk * dim * 8, kListBytes) + threads * gallery;
  return rows + threads * (block + survivors) + grouped + gallery * static_cast<int64_t>(sizeof(RowStats));
}

// What one thread keeps for the chunk it works on.
template <class S>
struct TopKSlot {
  Buffer<Candidate> candidates;  // [chunk][capacity]
  Buffer<int64_t> counts;        // [chunk]
  EncodeScratch<S> encode;
  LoadedQuery query;  // the one being verified
  Buffer<double> query_values;
  std::vector<Match> scored;
  std::vector<Candidate> survivors;  // of the query being finished
  Buffer<S> scratch;
};

// Keeps a flag for as long as it lives. What it guards takes no longer than to offer a few matches.
class Hold {
 public:
  explicit Hold(std::atomic_flag& flag) : flag_(flag) {
    while (flag_.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Hold() { flag_.clear(std::memory_order_release); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  std::atomic_flag& flag_;
};

// What all threads know of one query of a chunk.
struct QueryState {
  std::atomic<float> threshold{-kInfinity};  // no pair whose x is below it is looked at
  std::atomic_flag busy = ATOMIC_FLAG_INIT;  // whoever holds it may touch `best`
  BestMatches best;                          // of the pairs verified so far
  float guess = -kInfinity;                  // a threshold that is not proved yet

  void raise(float value) {
    float current = threshold.load(std::memory_order_relaxed);
    while (value > current && !threshold.compare_exchange_weak(current, value, std::memory_order_relaxed)) {
    }
  }
};

struct TopKChunk : QueryChunk {
  std::unique_ptr<QueryState[]> states;

  float threshold(int64_t row) const { return states[row].threshold.load(std::memory_order_relaxed); }
};

}  // namespace pycm::cpu
