// One search: its memory, and its launches over batches of queries and runs of the gallery. What topk and rank share.
//
//   workspace | query codes | states | candidates | gallery codes and bounds, a run of them; none where they are encoded already
//
// Bytes: lay_out. Operations: those of encode.cu and of the screens.
#include <algorithm>

#include "core/check.h"
#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kThreads = 256;
// Bytes of a batch's codes and candidates: about kBudget or this share of the inputs, more for kMinBatch queries, but not beyond
// kMaxBudget; and of a run of the gallery's codes, which is to stay in the second-level cache until it has been screened.
// Small on the host executor, so that small tests take more than one batch and run.
#if defined(PYCM_SIMT)
constexpr int64_t kBudget = int64_t{256} << 10, kMaxBudget = int64_t{8} << 20, kCodeBudget = int64_t{256} << 10;
constexpr int64_t kMinBatch = 2 * kTileQueries, kInputShare = 40;
#else
constexpr int64_t kBudget = int64_t{64} << 20, kMaxBudget = int64_t{512} << 20, kCodeBudget = int64_t{32} << 20;
constexpr int64_t kMinBatch = 1024, kInputShare = 40;
#endif

// Columns of values that stand for themselves: no errors, but the infinite ones, which say never and always.
__global__ void __launch_bounds__(kThreads) drop_errors_kernel(const float2* from, float2* to, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const float2 column = from[i];
  to[i] = {column.x, std::isfinite(column.y) ? 0 : column.y};
}

}  // namespace

int64_t power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

void check_search_sizes(const char* function, const Rows& queries, const Rows& gallery) {
  check(queries.rows < kMaxRows && gallery.rows < kMaxRows, function,
        ": queries and gallery must have fewer than 2147483648 rows each on CUDA, got ", queries.rows, " and ",
        gallery.rows);
}

SearchBuffers lay_out(const Rows& queries, const Rows& gallery, void* encoded, bool exact, int64_t capacity,
                      Workspace& workspace) {
  const int64_t dim = round_up(gallery.dim, kCodeStep), all = round_up(gallery.rows, kTileColumns);
  const int64_t inputs = (queries.rows + gallery.rows) * gallery.dim * item_size(gallery.dtype);
  const int64_t budget = std::max(kBudget, inputs / kInputShare);
  const int64_t query_bytes = capacity * static_cast<int64_t>(sizeof(Candidate)) + dim * 2;
  SearchBuffers buffers{};
  buffers.capacity = capacity;
  buffers.batch = std::max<int64_t>(1, std::max(budget / query_bytes, std::min(kMinBatch, kMaxBudget / query_bytes)));
  if (buffers.batch > kTileQueries) buffers.batch = buffers.batch / kTileQueries * kTileQueries;
  buffers.batch = std::min(buffers.batch, queries.rows);
  buffers.encoded = encoded != nullptr;
  buffers.code_rows =
      buffers.encoded ? all : std::min(std::max(kCodeBudget / (dim * 2) / kTileColumns * kTileColumns, capacity), all);
  buffers.kept = buffers.code_rows == all;
  const int64_t padded = round_up(buffers.batch, kTileQueries);
  buffers.query_codes = workspace.take<uint16_t>(padded * dim);
  buffers.states = workspace.take<QueryState>(padded);
  buffers.candidates = workspace.take<Candidate>(buffers.batch * capacity);
  buffers.direct = workspace.take<uint32_t>(1 + buffers.batch);
  Workspace kept(encoded);
  buffers.gallery = lay_out_encoding(buffers.code_rows, gallery.dim, buffers.encoded ? kept : workspace);
  if (buffers.encoded && !exact) buffers.without_errors = workspace.take<float2>(all);
  return buffers;
}

Search::Search(const Rows& queries, const Rows& gallery, Metric metric, bool exact, PairFilter filter, bool ranks,
               const SearchBuffers& buffers, const SearchNames& names, void* stream)
    : queries_(queries),
      gallery_(gallery),
      metric_(traits_of(metric)),
      exact_(exact),
      buffers_(buffers),
      names_(names),
      stream_(stream),
      codes_(buffers.gallery),
      screen_{} {
  screen_.queries = buffers.query_codes;
  screen_.state = buffers.states;
  screen_.candidates = buffers.candidates;
  screen_.dim = round_up(gallery.dim, kCodeStep);
  screen_.capacity = buffers.capacity;
  screen_.shuffle = shuffle_of(gallery.rows);
  screen_.filter = filter;
  screen_.ranks = ranks;
  screen_.distance = metric_.distance;
  if (!buffers.encoded) {
    if (metric_.distance) launch_centre(gallery, codes_.centre, names.centre, stream);
  } else if (!exact) {
    const int64_t count = buffers.code_rows;
    launch(drop_errors_kernel,
           {dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 1, 0, stream},
           names.gallery, codes_.columns.scale_error, buffers.without_errors, count);
    codes_.columns.scale_error = buffers.without_errors;
  }
}

void Search::start(int64_t begin, int64_t rows) {
  screen_.query_begin = begin;
  screen_.query_rows = rows;
  memset_async(buffers_.direct, 0, sizeof(uint32_t), stream_, names_.clear);
  launch_encode_queries(queries_, begin, rows, metric_, exact_, codes_.centre, buffers_.query_codes, buffers_.states,
                        buffers_.direct, names_.queries, stream_);
}

void Search::screen(int64_t first, int64_t last) {
  const int64_t place = buffers_.kept ? first : 0;
  const Encoding codes{codes_.codes + place * kCodeStep, codes_.stride, codes_.columns.from(place), codes_.centre};
  if (!buffers_.encoded && (!buffers_.kept || screen_.query_begin == 0))
    launch_encode_gallery(gallery_, first, last - first, metric_, exact_, codes, names_.gallery, stream_);
  screen_.gallery = codes.codes;
  screen_.stride = codes.stride;
  screen_.column = codes.columns;
  screen_.begin = first;
  screen_.columns = last - first;
  launch_screen(screen_, names_.screen, stream_);
}

}  // namespace pycm::cuda
