// topk on the CPU: screen in low precision, verify in fp64 (docs/exactness.md proves that no match is lost).
//
//   queries in chunks, packed once            tiles  [word][height]
//   gallery in blocks of the L2 cache         panels [word][columns]   encoded for the call, or once for many (Gallery)
//   tile x panel -> value; a pair survives if value + error bound >= its query's threshold; survivors go to a list per
//   query and thread. A full list is cut down: the pairs that look like matches are verified, scored in fp64, and the k-th
//   best exact score of all threads becomes the threshold. At the end of a chunk what survives, a few k a query at most,
//   is verified and ordered by (score, index).
//
// Blocks are samples of the gallery (search.h). For larger k the first of them give a guess of the final threshold, which
// spares most of the k ln(M / k) pairs that would pass on the way; a query whose k-th match turns out to be worse than the
// guess is searched again without it.
// Work: 2 N M D operations of the screen. Memory: the gallery once per chunk of queries.
#include "ops/topk.h"

#include "cpu/grouped_pairs.h"
#include "cpu/topk_chunk.h"
#include "cpu/topk_scan.h"

namespace pycm::cpu {
namespace {

// Guessing a threshold: after a few panels and at last after this share of the blocks, of at least so many, for so large a k.
constexpr int64_t kGuessPanels = 4, kGuessShare = 16, kGuessBlocks = 32, kGuessK = 8, kGuessRows = 64;

template <class M, class S>
class TopK {
  using Slot = TopKSlot<S>;
  using Chunk = TopKChunk;
  static constexpr int64_t kAhead = 4;  // rows fetched before they are scored

 public:
  TopK(const TopKArgs& args, const EncodedGallery* encoded, int num_threads)
      : args_(args),
        search_(args.queries, args.gallery, encoded, args.screen, args.precision == Precision::kExact, num_threads),
        filter_(args.mask, args.exclude, args.exclude_offsets, args.queries.rows),
        threads_(num_threads),
        slots_(num_threads) {
    search_.allow(threads_ * candidate_capacity(args.k));
  }

  void run() {
    const int64_t total = args_.queries.rows, blocks = search_.blocks();
    int64_t per_chunk = chunk_rows(total, args_.k, threads_);
    // Sharing the gallery reads it once for all threads, but each fills lists of k of its own.
    const bool long_lists = 16 * args_.k * threads_ > search_.rows();
    const bool split_gallery = total <= threads_ * kMaxTileRows || (blocks >= 4 * threads_ && !long_lists);
    if (split_gallery) {
      for (int64_t begin = 0; begin < total; begin += per_chunk) {
        Chunk chunk;
        open(chunk, begin, std::min(per_chunk, total - begin), threads_);
        if (may_guess(chunk)) visit_guessing(chunk);
        else visit_blocks(chunk, 0, blocks);
        search_.all_stats_ready();
        close_all(chunk);
        search_again(chunk);
      }
      return;
    }
    // Few blocks, many queries: each thread takes chunks of its own.
    parallel_for(blocks, threads_, [&](int64_t b, int slot) { search_.prepare_stats(b, slots_[slot].encode); });
    search_.all_stats_ready();
    per_chunk = std::min(per_chunk, std::max<int64_t>(kMaxTileRows, round_up(total / (4 * threads_), kMaxTileRows)));
    parallel_for((total + per_chunk - 1) / per_chunk, threads_, [&](int64_t c, int slot) {
      Chunk chunk;
      Slot& mine = slots_[slot];
      open(chunk, c * per_chunk, std::min(per_chunk, total - c * per_chunk), 1, &mine);
      for (int64_t b = 0; b < blocks; ++b) visit_rows(chunk, search_.block_rows(b), mine);
      for (int64_t row = 0; row < chunk.rows; ++row) close(chunk, row, Span{&mine, 1}, mine);
    });
  }

 private:
  struct Span {
    Slot* first;
    size_t count;
    Slot* begin() const { return first; }
    Slot* end() const { return first + count; }
  };

  // ---- a chunk begins ----

  void open(Chunk& chunk, int64_t begin, int64_t rows, int threads, Slot* only = nullptr) {
    chunk.states = std::make_unique<QueryState[]>(rows);
    for (int64_t i = 0; i < rows; ++i) chunk.states[i].best.reset(args_.k, search_.rows());
    const int64_t dim = search_.dim();
    for (Slot& slot : only != nullptr ? Span{only, 1} : Span{slots_.data(), slots_.size()}) {
      slot.scratch.reserve(dim);
      slot.query_values.reserve(dim);
      slot.query.values = slot.query_values.get();
      slot.counts.reserve(rows);
      std::fill_n(slot.counts.get(), rows, 0);
      slot.candidates.reserve(rows * candidate_capacity(args_.k));
    }
    search_.open(chunk, begin, rows, threads,
                 [&](int slot) -> EncodeScratch<S>& { return (only != nullptr ? *only : slots_[slot]).encode; });
  }

  // ---- screening ----

  void visit_blocks(Chunk& chunk, int64_t first, int64_t last) {
    parallel_for(last - first, threads_,
                 [&](int64_t b, int slot) { visit_rows(chunk, search_.block_rows(first + b), slots_[slot]); });
  }

  void visit_rows(Chunk& chunk, const BlockRows& rows, Slot& slot) {
    search_.visit(
        chunk, rows, slot.encode, [&](int64_t row) { return chunk.threshold(row); }, nullptr,
        [&](const ScreenQueries& queries, int64_t row, int64_t index, const ScreenColumns& columns, uint32_t hits,
            uint32_t, const float* values) { append(chunk, queries, row, index, columns, hits, values, slot); });
  }

  void append(Chunk& chunk, const ScreenQueries& queries, int64_t row, int64_t first, const ScreenColumns& columns,
              uint32_t hits, const float* values, Slot& slot) {
    const int64_t capacity = candidate_capacity(args_.k);
    Candidate* list = slot.candidates.get() + row * capacity;
    int64_t& count = slot.counts[row];
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      const int64_t index = first + lane;
      if (!filter_.allows(chunk.begin + row, index)) continue;
      const Interval interval = queries.interval(row, columns, lane, values[lane]);
      if (interval.upper < chunk.threshold(row)) continue;
      list[count++] = {interval.lower, interval.upper, index};
      if (count == capacity) shrink(chunk, row, list, count, slot);
    }
  }

  // A full list: what cannot be a match any more is dropped, and if that is not enough, what looks like one is verified.
  void shrink(Chunk& chunk, int64_t row, Candidate* list, int64_t& count, Slot& slot) {
    const int64_t capacity = candidate_capacity(args_.k);
    QueryState& state = chunk.states[row];
    const float known = chunk.threshold(row);
    state.raise(prune(list, count, args_.k, known));
    if (2 * count <= capacity) return;
    // Until k pairs are verified those with the k best lower bounds come first; then those above the k-th of them.
    const bool started = known > -kInfinity && known != state.guess;
    const float threshold = chunk.threshold(row);
    Candidate* first = started ? std::partition(list, list + count,
                                                [&](const Candidate& c) { return c.lower + c.upper >= 2 * threshold; })
                               : list + std::min(count, args_.k);
    verify(chunk, row, list, first - list, slot);
    count = drop(chunk, row, first, list + count, list);
    if (4 * count <= 3 * capacity) return;
    verify(chunk, row, list, count, slot);
    count = 0;
  }

  // Copies those of [first, last) that may still be matches to `out`; returns how many.
  static int64_t drop(const Chunk& chunk, int64_t row, const Candidate* first, const Candidate* last, Candidate* out) {
    const float threshold = chunk.threshold(row);
    return std::copy_if(first, last, out, [&](const Candidate& c) { return c.upper >= threshold; }) - out;
  }

  // ---- guessing ----

  // Not without verification: a guess is proved by exact scores.
  bool may_guess(const Chunk& chunk) const {
    return exact() && chunk.rows >= kGuessRows && args_.k >= kGuessK && search_.blocks() >= kGuessBlocks &&
           !guesses_fail_;
  }

  // All blocks, with a guess after a few panels, after a block for each thread, and after a good share of all.
  void visit_guessing(Chunk& chunk) {
    const int64_t blocks = search_.blocks();
    const BlockRows first = search_.block_rows(0);
    visit_rows(chunk, first.head(kGuessPanels), slots_[0]);
    guess(chunk, first.head(kGuessPanels).count);
    visit_rows(chunk, first.tail(kGuessPanels), slots_[0]);
    int64_t seen = 1;
    for (int64_t sample : {1 + std::min<int64_t>(threads_, blocks / kGuessShare), blocks / kGuessShare + 1}) {
      visit_blocks(chunk, seen, sample);
      seen = sample;
      guess(chunk, search_.rows() * seen / blocks);
    }
    visit_blocks(chunk, seen, blocks);
  }

  // From the rows seen so far, for every query.
  void guess(Chunk& chunk, int64_t seen) {
    parallel_for(chunk.rows, threads_, [&](int64_t row, int slot) { guess(chunk, row, seen, slots_[slot]); });
  }

  // After a share f of the gallery k f of the k best have been seen, give or take a few roots of that. The worst of so many,
  // and some more, is a likely threshold.
  void guess(Chunk& chunk, int64_t row, int64_t rows_seen, Slot& mine) {
    const double expected =
        static_cast<double>(args_.k) * static_cast<double>(rows_seen) / static_cast<double>(search_.rows());
    const int64_t place = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    std::vector<Candidate>& seen = mine.survivors;
    seen.clear();
    gather(chunk, row, slots_, seen);
    for (const Match& match : chunk.states[row].best.matches()) {
      const float x = value_of(chunk, row, match.key);
      seen.push_back({x, x, match.index});
    }
    if (place >= static_cast<int64_t>(seen.size()) || place >= args_.k) return;
    const auto better = [](const Candidate& a, const Candidate& b) { return a.lower + a.upper > b.lower + b.upper; };
    std::nth_element(seen.begin(), seen.begin() + place, seen.end(), better);
    const float x = 0.5f * (seen[place].lower + seen[place].upper);
    if (!(x > chunk.threshold(row)) || !std::isfinite(x)) return;
    chunk.states[row].guess = x;
    chunk.states[row].raise(x);
  }

  // Queries whose guess was too high: the gallery once more, without guessing.
  void search_again(Chunk& chunk) {
    std::vector<int64_t> failed;
    for (int64_t row = 0; row < chunk.rows; ++row)
      if (chunk.states[row].guess == kInfinity) failed.push_back(row);
    if (failed.empty()) return;
    guesses_fail_ = 32 * static_cast<int64_t>(failed.size()) > chunk.rows;
    if (static_cast<int64_t>(failed.size()) > 4 * threads_) {
      open(chunk, chunk.begin, chunk.rows, threads_);
      visit_blocks(chunk, 0, search_.blocks());
      close_all(chunk);
      return;
    }
    parallel_for(static_cast<int64_t>(failed.size()), threads_, [&](int64_t f, int index) {
      Slot& slot = slots_[index];
      QueryState& state = chunk.states[failed[f]];
      state.best.reset(args_.k, search_.rows());
      std::vector<Candidate>& some = slot.survivors;
      some.clear();
      for (int64_t j = 0; j < search_.rows(); ++j) {
        if (filter_.allows(chunk.begin + failed[f], j)) some.push_back({-kInfinity, kInfinity, j});
        if (static_cast<int64_t>(some.size()) < candidate_capacity(args_.k) && j + 1 < search_.rows()) continue;
        verify(chunk, failed[f], some.data(), static_cast<int64_t>(some.size()), slot);
        some.clear();
      }
      write(chunk, failed[f]);
    });
  }

  // ---- verifying ----

  bool exact() const { return args_.precision == Precision::kExact; }

  // Without verification a match's key is its screened value; only what is written becomes a score.
  float value_of(const Chunk& chunk, int64_t row, double key) const {
    return exact() ? search_.first(chunk).template value_of<M>(row, key) : static_cast<float>(key);
  }

  double key(const Chunk& chunk, int64_t row, const Candidate& candidate, Slot& slot) const {
    if (!exact() && std::isfinite(candidate.upper)) return candidate.upper;
    const Verifier<M, S>& verifier = search_.verifier();
    const double key = verifier.key(slot.query, candidate.index, search_.stats(candidate.index), slot.scratch.get());
    return exact() || std::isnan(key) ? key : static_cast<double>(search_.first(chunk).template value_of<M>(row, key));
  }

  // Scores pairs exactly, and raises the threshold to the k-th best score of all so far.
  void verify(Chunk& chunk, int64_t row, const Candidate* candidates, int64_t count, Slot& slot) const {
    if (count == 0) return;
    search_.verifier().load(chunk.begin + row, slot.query, slot.scratch.get());
    slot.scored.clear();
    for (int64_t c = 0; c < count; ++c) {
      if (exact() && c + kAhead < count) search_.verifier().prefetch(candidates[c + kAhead].index);
      slot.scored.push_back({key(chunk, row, candidates[c], slot), candidates[c].index});
    }
    offer(chunk, row, slot.scored);
  }

  void offer(Chunk& chunk, int64_t row, const std::vector<Match>& scored) const {
    QueryState& state = chunk.states[row];
    const Hold hold(state.busy);
    for (const Match& match : scored) state.best.offer(match.key, match.index);
    state.best.keep_best();
    if (state.best.full()) state.raise(value_of(chunk, row, state.best.worst_key()));
  }

  // ---- a chunk ends ----

  template <class Slots>
  void gather(const Chunk& chunk, int64_t row, Slots&& slots, std::vector<Candidate>& out) const {
    const float threshold = chunk.threshold(row);
    for (const Slot& slot : slots) {
      const Candidate* list = slot.candidates.get() + row * candidate_capacity(args_.k);
      for (int64_t c = 0; c < slot.counts[row]; ++c)
        if (list[c].upper >= threshold) out.push_back(list[c]);
    }
  }

  template <class Slots>
  void close(Chunk& chunk, int64_t row, Slots&& slots, Slot& mine) {
    std::vector<Candidate>& survivors = mine.survivors;
    survivors.clear();
    gather(chunk, row, slots, survivors);
    int64_t count = static_cast<int64_t>(survivors.size());
    QueryState& state = chunk.states[row];
    state.raise(prune(survivors.data(), count, args_.k, chunk.threshold(row)));
    // The exact scores of those that look best rule out many of the others.
    const int64_t first = std::min(count, args_.k);
    verify(chunk, row, survivors.data(), first, mine);
    Candidate* rest = survivors.data() + first;
    verify(chunk, row, rest, drop(chunk, row, rest, survivors.data() + count, rest), mine);
    settle(chunk, row);
  }

  void settle(Chunk& chunk, int64_t row) const {
    QueryState& state = chunk.states[row];
    // A guess is proved by k pairs that reach it.
    if (state.guess > -kInfinity &&
        !(state.best.full() && value_of(chunk, row, state.best.worst_key()) >= state.guess)) {
      state.guess = kInfinity;
      return;
    }
    write(chunk, row);
  }

  // Every query of the chunk. Where there are several pairs to verify for every row of the gallery they are taken in the
  // order of its rows, each of which is then read from memory once and not once for every query.
  void close_all(Chunk& chunk) {
    int64_t pairs = 0;
    std::vector<int64_t> offsets(chunk.rows + 1, 0);
    for (int64_t row = 0; row < chunk.rows; ++row) {
      for (const Slot& slot : slots_) pairs += slot.counts[row];
      offsets[row + 1] = pairs;
    }
    const bool fits = chunk.rows * search_.dim() * static_cast<int64_t>(sizeof(double)) <= kListBytes;
    if (!exact() || !fits || 2 * pairs < search_.rows()) {
      parallel_for(chunk.rows, threads_, [&](int64_t row, int slot) { close(chunk, row, slots_, slots_[slot]); });
      return;
    }
    GroupedPairs<M, S> grouped(search_, chunk.begin, chunk.rows, threads_);
    Buffer<Candidate> all(pairs);
    std::vector<int64_t> counts(chunk.rows);
    parallel_for(chunk.rows, threads_, [&](int64_t row, int slot) {
      std::vector<Candidate>& survivors = slots_[slot].survivors;
      survivors.clear();
      gather(chunk, row, slots_, survivors);
      int64_t count = static_cast<int64_t>(survivors.size());
      chunk.states[row].raise(prune(survivors.data(), count, args_.k, chunk.threshold(row)));
      std::copy_n(survivors.data(), count, all.get() + offsets[row]);
      counts[row] = count;
    });
    for (const bool first : {true, false}) {
      const auto range = [&](int64_t row) {
        const int64_t best = std::min(counts[row], args_.k);
        Candidate* begin = all.get() + offsets[row];
        if (first) return std::pair(begin, best);
        return std::pair(begin + best, drop(chunk, row, begin + best, begin + counts[row], begin + best));
      };
      grouped.score(range, [&](int64_t row, const std::vector<Match>& scored) { offer(chunk, row, scored); });
    }
    parallel_for(chunk.rows, threads_, [&](int64_t row, int) { settle(chunk, row); });
  }

  void write(const Chunk& chunk, int64_t row) const {
    const int64_t at = (chunk.begin + row) * args_.k;
    S* scores = static_cast<S*>(args_.scores) + at;
    Verifier<M, S>::write(chunk.states[row].best.sorted(), args_.k, scores, args_.indices + at);
    if (exact()) return;
    for (int64_t i = 0; i < args_.k && args_.indices[at + i] >= 0; ++i) {
      const double value = M::kDistance ? -static_cast<double>(scores[i]) : static_cast<double>(scores[i]);
      scores[i] = static_cast<S>(search_.first(chunk).template score_of<M>(row, value));
    }
  }

  const TopKArgs& args_;
  Search<M, S> search_;
  Filter filter_;
  int threads_;
  bool guesses_fail_ = false;  // too often
  std::vector<Slot> slots_;
};

}  // namespace

void topk(const TopKArgs& args, const EncodedGallery* encoded) {
  if (args.queries.rows == 0) return;
  const DefaultFloatMode float_mode;
  const double work = static_cast<double>(args.queries.rows) * static_cast<double>(args.gallery.rows) *
                      static_cast<double>(args.gallery.dim);
  const int threads = search_threads(args.queries, args.gallery, args.num_threads);
  const bool scan = args.precision == Precision::kExact && args.screen == ScreenChoice::kAuto &&
                    use_scan(args.queries.rows, args.gallery.rows, args.k, work, encoded != nullptr);
  visit(args.metric, [&](auto metric) {
    visit_source(args.queries.dtype, [&](auto source) {
      using M = decltype(metric);
      using S = decltype(source);
      if (scan) {
        ScanTopK<M, S>(args, threads).run();
      } else {
        TopK<M, S>(args, encoded, threads).run();
      }
    });
  });
}

int64_t topk_workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
  const int64_t scan = ScanTopK<Cosine, float>::workspace_bytes(queries, gallery, dim, k, num_threads);
  if (4 * k > gallery) return scan;
  return std::max(scan, chunk_workspace_bytes(queries, gallery, dim, k, num_threads));
}

}  // namespace pycm::cpu
