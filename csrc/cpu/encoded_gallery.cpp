#include "cpu/encoded_gallery.h"

#include <vector>

#include "cpu/screening.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kTaskRows = 8 * kPanelColumns;
constexpr double kRowWork = 2000;  // a row's share that is worth waking a thread for

}  // namespace

void EncodedGallery::extend(const Rows& rows, int num_threads) {
  const DefaultFloatMode float_mode;
  visit(metric_, [&](auto metric) {
    visit_source(rows.dtype, [&](auto source) { encode<decltype(metric), decltype(source)>(rows, num_threads); });
  });
}

template <class M, class S>
void EncodedGallery::encode(const Rows& rows, int num_threads) {
  const RowReader<S> reader(rows);
  const int64_t old = size_;
  if (size_ == 0) {
    own_ = nullptr;  // of an attempt that failed, perhaps in another shape
    dim_ = rows.dim;
    const bool quick_int8 = kernels().quick[static_cast<int>(ScreenKind::kInt8)];
    kind_ = choice_ == ScreenChoice::kBFloat16                                                 ? ScreenKind::kBFloat16
            : choice_ == ScreenChoice::kInt8 || (choice_ == ScreenChoice::kAuto && quick_int8) ? ScreenKind::kInt8
                                                                                               : ScreenKind::kFloat32;
    if (!can_screen(kind_, dim_)) kind_ = ScreenKind::kFloat32;
    choose_transform<M, S>(reader, kind_, transform_);
  }
  const Screening<M, S> screening(kind_, reader, reader, transform_, true);
  words_ = kind_ == ScreenKind::kFloat32 ? 0 : screening.words();
  grow(rows.rows);
  // The panel that was not full is encoded anew.
  const int64_t begin = old / kPanelColumns * kPanelColumns;
  const int64_t tasks = (rows.rows - begin + kTaskRows - 1) / kTaskRows;
  const int threads =
      threads_for(static_cast<double>(rows.rows - begin) * static_cast<double>(rows.dim), kRowWork * 64, num_threads);
  std::vector<EncodeScratch<S>> scratch(threads);
  parallel_for(tasks, threads, [&](int64_t task, int slot) {
    const int64_t first = begin + task * kTaskRows, count = std::min(kTaskRows, rows.rows - first);
    if (kind_ == ScreenKind::kFloat32) {
      scratch[slot].source.reserve(rows.dim);
      for (int64_t i = first; i < first + count; ++i)
        stats_[i] = bound_stats<M>(reader.read(i, scratch[slot].source.get()), rows.dim);
      return;
    }
    screening.encode_panels({first, count}, stats_ + first, true, panels_ + first * words_,
                            ColumnWriter(columns_, capacity_, first), scratch[slot]);
  });
  rows_ = rows;
  size_ = rows.rows;
}

// Room for whole panels of `rows` rows, half as much again when it has to grow.
void EncodedGallery::grow(int64_t rows) {
  if (rows <= capacity_ && own_ != nullptr) return;
  int64_t capacity = round_up(rows, kPanelColumns);
  if (size_ > 0) capacity = std::max(capacity, round_up(size_ + size_ / 2, kPanelColumns));
  const auto memory = std::make_shared<Memory>();
  memory->panels.reserve(capacity * words_);
  memory->columns.reserve(kColumnArrays * capacity);
  memory->stats.reserve(capacity);
  const int64_t kept = words_ == 0 ? 0 : round_up(size_, kPanelColumns);
  std::copy_n(panels_, kept * words_, memory->panels.get());
  for (int a = 0; a < kColumnArrays; ++a)
    std::copy_n(columns_ + a * capacity_, kept, memory->columns.get() + a * capacity);
  std::copy_n(stats_, size_, memory->stats.get());
  own_ = memory;
  panels_ = memory->panels.get();
  columns_ = memory->columns.get();
  stats_ = memory->stats.get();
  capacity_ = capacity;
}

EncodedGallery::State EncodedGallery::state() const {
  State state;
  state.size = size_;
  state.dim = dim_;
  state.words = words_;
  state.capacity = capacity_;
  state.kind = static_cast<int64_t>(kind_);
  state.rotation = transform_.block;
  state.has_centre = transform_.centre.get() != nullptr;
  state.dtype = rows_.dtype;
  state.centre_norm = transform_.centre_norm;
  state.panels = panels_;
  state.columns = columns_;
  state.stats = stats_;
  state.centre = transform_.centre.get();
  state.memory = own_;
  return state;
}

void EncodedGallery::restore(const Rows& rows, const State& state) {
  Transform transform;
  transform.set_rotation(state.dim, state.rotation != 0);
  check(transform.block == state.rotation, "EncodedGallery: this rotation of ", state.rotation,
        " dimensions is of another version");
  if (state.has_centre != 0) {
    transform.centre = Buffer<double>(state.dim);
    std::copy_n(state.centre, state.dim, transform.centre.get());
    transform.centre_norm = state.centre_norm;
  }
  transform_ = std::move(transform);
  rows_ = rows;
  size_ = state.size;
  dim_ = state.dim;
  words_ = state.words;
  capacity_ = state.capacity;
  kind_ = static_cast<ScreenKind>(state.kind);
  panels_ = state.panels;
  columns_ = state.columns;
  stats_ = state.stats;
  own_ = nullptr;
}

}  // namespace pycm::cpu
