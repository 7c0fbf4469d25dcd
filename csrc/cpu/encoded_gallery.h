// A gallery whose rows were encoded once for many searches: panels, what a bound needs of each row, and the statistics of
// the exact score. The rows themselves stay the caller's. Panels look the same on every processor.
#pragma once

#include <memory>

#include "core/array.h"
#include "cpu/screen.h"
#include "cpu/transform.h"
#include "ops/screen.h"

namespace pycm::cpu {

class EncodedGallery {
 public:
  EncodedGallery(Metric metric, ScreenChoice choice) : metric_(metric), choice_(choice) {}

  // Encodes rows [size(), rows.rows). The first size() rows are those encoded before.
  void extend(const Rows& rows, int num_threads);

  Metric metric() const { return metric_; }
  ScreenChoice choice() const { return choice_; }
  // float32 until there are rows.
  ScreenKind kind() const { return kind_; }
  int64_t size() const { return size_; }
  int64_t dim() const { return dim_; }
  const Rows& rows() const { return rows_; }
  const Transform& transform() const { return transform_; }
  const RowStats* stats() const { return stats_; }

  ScreenBlock block(const BlockRows& rows) const {
    ScreenBlock block;
    static_cast<BlockRows&>(block) = rows;
    block.words = words_;
    block.kept_stride = rows.stride;
    block.columns = kPanelColumns;
    block.panels = panels_ + rows.begin * words_;
    block.kept = ColumnWriter(columns_, capacity_, rows.begin).columns();
    return block;
  }

  // ---- what a file keeps, besides the rows ----

  // What panels, columns and statistics were written to. A holder of it keeps them after the gallery has grown out of it.
  struct Memory {
    Buffer<uint32_t> panels;
    Buffer<float> columns;
    Buffer<RowStats> stats;
  };

  struct State {
    int64_t size = 0, dim = 0, words = 0, capacity = 0;
    int64_t kind = 0, rotation = 0, has_centre = 0;
    DType dtype = DType::kFloat32;
    double centre_norm = 0;
    uint32_t* panels = nullptr;  // [capacity / kPanelColumns][words][kPanelColumns]
    float* columns = nullptr;    // [kColumnArrays][capacity]
    RowStats* stats = nullptr;   // [capacity]
    double* centre = nullptr;    // [dim], when has_centre
    std::shared_ptr<Memory> memory;
  };
  State state() const;
  // Uses the arrays of `state` where they lie; the caller keeps them, unchanged. They are copied before rows are added.
  void restore(const Rows& rows, const State& state);

 private:
  template <class M, class S>
  void encode(const Rows& rows, int num_threads);
  void grow(int64_t rows);

  Metric metric_;
  ScreenChoice choice_;
  ScreenKind kind_ = ScreenKind::kFloat32;
  Rows rows_;
  int64_t size_ = 0, dim_ = 0, words_ = 0, capacity_ = 0;
  Transform transform_;
  uint32_t* panels_ = nullptr;
  float* columns_ = nullptr;
  RowStats* stats_ = nullptr;
  std::shared_ptr<Memory> own_;
};

}  // namespace pycm::cpu
