// EncodedGallery: rows encoded once for many searches, and what a file needs to keep of that.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <mutex>
#include <shared_mutex>

#include "bind/ops.h"
#include "bind/search_args.h"
#include "cpu/encoded_gallery.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "EncodedGallery";
constexpr int64_t kStateVersion = 1;

template <class T, int kDims>
using View = nb::ndarray<nb::numpy, T, nb::ndim<kDims>>;
template <class T, int kDims>
using Input = nb::ndarray<nb::numpy, const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

class Gallery {
 public:
  Gallery(const std::string& metric, const std::string& screen)
      : encoded_(parse_metric(kName, metric.c_str()), parse_screen(kName, screen.c_str())) {}

  void extend(nb::handle object, int num_threads) {
    auto rows = std::make_unique<ArrayArg>(kName, "rows", object);
    const int count = threads(num_threads);
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> turn(turn_);
    std::unique_lock lock(mutex_);
    check_rows(*rows);
    if (rows->size(0) > 0) encoded_.extend(rows_of(rows->array()), count);
    nb::gil_scoped_acquire acquire;  // the array held before may be freed here
    rows_ = std::move(rows);
    kept_ = nb::object();
  }

  nb::dict state() {
    const std::shared_lock<std::shared_mutex> lock = read_lock();
    const cpu::EncodedGallery::State state = encoded_.state();
    // Views keep what they look at: memory of the library's, or arrays given to restore().
    struct Owner {
      std::shared_ptr<cpu::EncodedGallery::Memory> memory;
      nb::object kept;
    };
    nb::capsule owner(new Owner{state.memory, kept_}, [](void* p) noexcept { delete static_cast<Owner*>(p); });
    const size_t padded = static_cast<size_t>(state.words == 0 ? 0 : cpu::round_up(state.size, cpu::kPanelColumns));
    nb::dict result;
    result["panels"] = nb::cast(View<uint32_t, 1>(state.panels, {padded * static_cast<size_t>(state.words)}, owner));
    result["columns"] =
        nb::cast(View<float, 2>(state.columns, {size_t{cpu::kColumnArrays}, padded}, owner, {state.capacity, 1}));
    result["stats"] = nb::cast(View<double, 2>(reinterpret_cast<double*>(state.stats), {size_t(state.size), 2}, owner));
    const int64_t centre_size = state.has_centre ? state.dim + 1 : 0;
    const int64_t info_size = 8;
    NewArray centre = new_array(Framework::kNumPy, Element::kFloat64, 1, &centre_size);
    if (state.has_centre) {
      std::copy_n(state.centre, state.dim, static_cast<double*>(centre.data));
      static_cast<double*>(centre.data)[state.dim] = state.centre_norm;
    }
    NewArray info = new_array(Framework::kNumPy, Element::kInt64, 1, &info_size);
    const int64_t values[] = {kStateVersion,
                              state.size,
                              state.dim,
                              state.words,
                              state.kind,
                              state.rotation,
                              static_cast<int64_t>(state.dtype),
                              static_cast<int64_t>(encoded_.metric())};
    std::copy_n(values, info_size, static_cast<int64_t*>(info.data));
    result["centre"] = centre.object;
    result["info"] = info.object;
    return result;
  }

  void restore(nb::handle object, nb::dict state) {
    auto rows = std::make_unique<ArrayArg>(kName, "rows", object);
    const auto panels = part<Input<uint32_t, 1>>(state, "panels", "uint32 [*]");
    const auto columns = part<Input<float, 2>>(state, "columns", "float32 [4, *]");
    const auto stats = part<Input<double, 2>>(state, "stats", "float64 [*, 2]");
    const auto centre = part<Input<double, 1>>(state, "centre", "float64 [*]");
    const auto info = part<Input<int64_t, 1>>(state, "info", "int64 [8]");
    check(info.shape(0) == 8, kName, ": info must have shape [8], got [", info.shape(0), "]");
    check(info.data()[0] == kStateVersion, kName, ": info must be of version ", kStateVersion, ", got ",
          info.data()[0]);
    cpu::EncodedGallery::State parts;
    parts.size = info.data()[1];
    parts.dim = info.data()[2];
    parts.words = info.data()[3];
    parts.kind = info.data()[4];
    parts.rotation = info.data()[5];
    check(parts.size == rows->size(0) && (parts.size == 0 || parts.dim == rows->size(1)), kName,
          ": rows must have shape [", parts.size, ", ", parts.dim, "], got ", rows->shape());
    check(info.data()[6] == static_cast<int64_t>(rows->array().dtype), kName,
          ": rows must have the encoded dtype, got ", name_of(rows->array().dtype));
    check(info.data()[7] == static_cast<int64_t>(metric()), kName, ": state must be of the metric ", name_of(metric()),
          ", got another");
    check(parts.kind >= 0 && parts.kind < cpu::kScreenKinds, kName, ": info names no screen, got ", parts.kind);
    const int64_t padded = parts.words == 0 ? 0 : cpu::round_up(parts.size, cpu::kPanelColumns);
    const int64_t dim = parts.rotation == 0 ? parts.dim : cpu::round_up(parts.dim, 32);
    const int64_t per_word = cpu::of_word(static_cast<cpu::ScreenKind>(parts.kind));
    check(parts.words == (parts.kind == 0 ? 0 : (dim + per_word - 1) / per_word), kName, ": info has ", parts.words,
          " words a row, which does not fit ", parts.dim, " dimensions");
    check_size("panels", panels.size(), padded * parts.words);
    check_size("columns", columns.size(), cpu::kColumnArrays * padded);
    check_size("stats", stats.size(), 2 * parts.size);
    check(centre.size() == 0 || static_cast<int64_t>(centre.size()) == parts.dim + 1, kName, ": centre must have ",
          parts.dim + 1, " elements or none, got ", centre.size());
    parts.capacity = padded;
    parts.has_centre = centre.size() != 0;
    parts.dtype = rows->array().dtype;
    // They are only read: rows are added to a copy.
    parts.panels = const_cast<uint32_t*>(panels.data());
    parts.columns = const_cast<float*>(columns.data());
    parts.stats = reinterpret_cast<cpu::RowStats*>(const_cast<double*>(stats.data()));
    parts.centre = const_cast<double*>(centre.data());
    if (parts.has_centre) parts.centre_norm = centre.data()[parts.dim];
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> turn(turn_);
    std::unique_lock lock(mutex_);
    check_rows(*rows);
    encoded_.restore(rows_of(rows->array()), parts);
    nb::gil_scoped_acquire acquire;
    rows_ = std::move(rows);
    kept_ = nb::tuple(nb::make_tuple(panels, columns, stats));
  }

  // ---- searches: many at once, none while rows are added ----

  template <class F>
  auto search(const char* function, nb::handle queries_object, F&& f) {
    const ArrayArg queries(function, "queries", queries_object);
    const std::shared_lock<std::shared_mutex> lock = read_lock();
    check(rows_ != nullptr && encoded_.size() > 0, function, ": gallery must have at least one row, got none");
    check_query_rows(function, queries);
    return f(queries, GalleryArg{encoded_.rows(), &encoded_});
  }

  Metric metric() const { return encoded_.metric(); }
  ScreenChoice choice() const { return encoded_.choice(); }
  int64_t size() const { return encoded_.size(); }
  int64_t dim() const { return encoded_.dim(); }
  const char* screen() const {
    constexpr const char* kNames[] = {"float32", "bfloat16", "int8"};
    return kNames[static_cast<int>(encoded_.kind())];
  }

 private:
  // Who waits for it must not hold the GIL, which a writer takes before it lets go.
  std::shared_lock<std::shared_mutex> read_lock() {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> turn(turn_);
    return std::shared_lock(mutex_);
  }
  template <class T>
  static T part(const nb::dict& state, const char* name, const char* expected) {
    check(state.contains(name), kName, ": state must have '", name, "'");
    T array;
    if (!nb::try_cast<T>(nb::object(state[name]), array, false))
      throw TypeError(text(kName, ": ", name, " must be a contiguous array ", expected));
    return array;
  }
  static void check_size(const char* name, size_t size, int64_t expected) {
    check(static_cast<int64_t>(size) == expected, kName, ": ", name, " must have ", expected, " elements, got ", size);
  }

  void check_rows(const ArrayArg& rows) const {
    check(rows.array().ndim == 2, kName, ": rows must have shape [M, D], got ", rows.shape());
    if (rows.framework() != Framework::kNumPy) throw TypeError(text(kName, ": rows must be a NumPy array"));
    if (encoded_.size() == 0) {
      check(rows.size(1) > 0, kName, ": rows must have at least one feature, got shape ", rows.shape());
      return;
    }
    check(rows.size(0) >= encoded_.size() && rows.size(1) == encoded_.dim(), kName,
          ": rows must have shape [>= ", encoded_.size(), ", ", encoded_.dim(), "], got ", rows.shape());
    if (rows.array().dtype != encoded_.rows().dtype)
      throw TypeError(text(kName, ": rows must have dtype ", name_of(encoded_.rows().dtype), ", got ",
                           name_of(rows.array().dtype)));
  }

  void check_query_rows(const char* function, const ArrayArg& queries) const {
    check(queries.array().ndim == 2 && queries.size(1) == encoded_.dim(), function, ": queries must have shape [N, ",
          encoded_.dim(), "], got ", queries.shape());
    if (queries.array().dtype != encoded_.rows().dtype)
      throw TypeError(text(function, ": queries must have the gallery's dtype ", name_of(encoded_.rows().dtype),
                           ", got ", name_of(queries.array().dtype)));
  }

  // Readers queue up for a turn like writers: a shared_mutex alone lets them overtake a writer for ever.
  std::mutex turn_;
  std::shared_mutex mutex_;
  cpu::EncodedGallery encoded_;
  std::unique_ptr<ArrayArg> rows_;
  nb::object kept_;  // what restore() was given
};

}  // namespace

void bind_gallery(nb::module_& module) {
  nb::class_<Gallery>(module, "EncodedGallery")
      .def(nb::init<const std::string&, const std::string&>(), nb::arg("metric"), nb::arg("screen") = "auto")
      .def("extend", &Gallery::extend, nb::sig("def extend(self, rows: typing.Any, num_threads: int = 0) -> None"),
           nb::arg("rows"), nb::arg("num_threads") = 0)
      .def("state", &Gallery::state, nb::sig("def state(self) -> dict[str, typing.Any]"))
      .def("restore", &Gallery::restore,
           nb::sig("def restore(self, rows: typing.Any, state: dict[str, typing.Any]) -> None"), nb::arg("rows"),
           nb::arg("state"))
      .def(
          "topk",
          [](Gallery& self, nb::handle queries, nb::handle k, nb::handle mask, nb::handle exclude, nb::handle offsets,
             nb::handle precision, int num_threads) {
            return self.search("topk", queries, [&](const ArrayArg& q, const GalleryArg& gallery) {
              return topk(q, gallery, k, self.metric(), precision, self.choice(), mask, exclude, offsets, num_threads);
            });
          },
          nb::sig("def topk(self, queries: typing.Any, k: typing.SupportsIndex, mask: typing.Any = None, "
                  "exclude: typing.Any = None, exclude_offsets: typing.Any = None, precision: str = 'exact', "
                  "num_threads: int = 0) -> tuple[typing.Any, typing.Any]"),
          nb::arg("queries"), nb::arg("k").none(), nb::arg("mask") = nb::none(), nb::arg("exclude") = nb::none(),
          nb::arg("exclude_offsets") = nb::none(), nb::arg("precision").none() = "exact", nb::arg("num_threads") = 0)
      .def(
          "rank",
          [](Gallery& self, nb::handle queries, nb::handle positives, nb::handle positive_offsets, nb::handle mask,
             nb::handle exclude, nb::handle offsets, int num_threads) {
            return self.search("rank", queries, [&](const ArrayArg& q, const GalleryArg& gallery) {
              return rank(q, gallery, positives, positive_offsets, self.metric(), self.choice(), mask, exclude, offsets,
                          num_threads);
            });
          },
          nb::sig("def rank(self, queries: typing.Any, positives: typing.Any, offsets: typing.Any, "
                  "mask: typing.Any = None, exclude: typing.Any = None, exclude_offsets: typing.Any = None, "
                  "num_threads: int = 0) -> tuple[typing.Any, typing.Any, typing.Any]"),
          nb::arg("queries"), nb::arg("positives"), nb::arg("offsets"), nb::arg("mask") = nb::none(),
          nb::arg("exclude") = nb::none(), nb::arg("exclude_offsets") = nb::none(), nb::arg("num_threads") = 0)
      .def(
          "join",
          [](Gallery& self, nb::handle queries, double threshold, int64_t after, int64_t limit, int num_threads) {
            return self.search("join", queries, [&](const ArrayArg& q, const GalleryArg& gallery) {
              return join(q, gallery, threshold, self.metric(), self.choice(), after, limit, num_threads);
            });
          },
          nb::sig("def join(self, queries: typing.Any, threshold: float, after: int, limit: int, "
                  "num_threads: int = 0) -> tuple[typing.Any, typing.Any, typing.Any]"),
          nb::arg("queries"), nb::arg("threshold"), nb::arg("after"), nb::arg("limit"), nb::arg("num_threads") = 0)
      .def("__len__", &Gallery::size)
      .def_prop_ro("dim", &Gallery::dim)
      .def_prop_ro("metric", [](const Gallery& self) { return name_of(self.metric()); })
      .def_prop_ro("screen", &Gallery::screen);
}

}  // namespace pycm::bind
