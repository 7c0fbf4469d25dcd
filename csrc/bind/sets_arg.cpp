#include "bind/sets_arg.h"

namespace pycm::bind {

namespace {

// A contiguous vector of so many int64.
const int64_t* integers(const char* function, const std::string& name, const ArrayArg& vector, int64_t count) {
  const Array& a = vector.array();
  check(a.ndim == 1 && a.shape[0] == count, function, ": ", name, " must have shape [", count, "], got ",
        vector.shape());
  check(count < 2 || a.strides[0] == 1, function, ": ", name, " must be contiguous");
  return static_cast<const int64_t*>(a.data);
}

}  // namespace

SetsArg::SetsArg(const char* function, const char* name, const char* item, nb::handle values, nb::handle lengths,
                 nb::handle offsets, Memory memory)
    : values_(function, name, values, Content::kFloat, memory) {
  const Array& a = values_.array();
  const bool ragged = !offsets.is_none();
  check(a.ndim == (ragged ? 2 : 3), function, ": ", name, " must have shape ",
        ragged ? "[total, D] where offsets are given" : "[items, T, D]", ", got ", values_.shape());
  check(a.shape[a.ndim - 1] > 0, function, ": ", name, " must have at least one feature, got shape ", values_.shape());
  check(!ragged || lengths.is_none(), function, ": ", name, " must have lengths or offsets, not both");
  sets.data = a.data;
  sets.dtype = a.dtype;
  sets.dim = a.shape[a.ndim - 1];
  sets.row_stride = a.strides[a.ndim - 2];
  sets.dim_stride = a.strides[a.ndim - 1];
  if (ragged) {
    sets.total = a.shape[0];
    label_ = text(item, "_offsets");
    borders_.emplace(function, label_.c_str(), offsets, Content::kInt64, memory);
    check(borders_->array().ndim == 1 && borders_->size(0) > 0, function, ": ", label_,
          " must have shape [items + 1], got ", borders_->shape());
    sets.items = borders_->size(0) - 1;
    sets.offsets = integers(function, label_, *borders_, sets.items + 1);
    if (memory == Memory::kDevice) return;
    check(sets.offsets[0] == 0 && sets.offsets[sets.items] == sets.total, function, ": ", label_,
          " must run from 0 to ", sets.total, ", got ", sets.offsets[0], " to ", sets.offsets[sets.items]);
    for (int64_t i = 0; i < sets.items; ++i)
      check(sets.offsets[i] <= sets.offsets[i + 1], function, ": ", label_, " must not decrease, got ", sets.offsets[i],
            " before ", sets.offsets[i + 1]);
    return;
  }
  sets.items = a.shape[0];
  sets.max_length = a.shape[1];
  sets.item_stride = a.strides[0];
  sets.total = sets.items * sets.max_length;
  if (lengths.is_none()) return;
  label_ = text(item, "_lengths");
  borders_.emplace(function, label_.c_str(), lengths, Content::kInt64, memory);
  sets.lengths = integers(function, label_, *borders_, sets.items);
  if (memory == Memory::kDevice) return;
  for (int64_t i = 0; i < sets.items; ++i)
    check(sets.lengths[i] >= 0 && sets.lengths[i] <= sets.max_length, function, ": ", label_, " must be in [0, ",
          sets.max_length, "], got ", sets.lengths[i]);
}

std::vector<const ArrayArg*> SetsArg::arrays() const {
  if (borders_) return {&values_, &*borders_};
  return {&values_};
}

void check_sets(const char* function, const char* a_name, const SetsArg& a, const char* b_name, const SetsArg& b) {
  if (a.framework() != b.framework())
    throw TypeError(text(function, ": ", a_name, " and ", b_name, " must both be torch or both NumPy arrays"));
  if (a.sets.dtype != b.sets.dtype)
    throw TypeError(text(function, ": ", b_name, " must have the ", a_name, "' dtype ", name_of(a.sets.dtype), ", got ",
                         name_of(b.sets.dtype)));
  check(a.sets.dim == b.sets.dim, function, ": ", b_name, " must have the ", a_name, "' ", a.sets.dim,
        " features, got shape ", b.shape());
}

namespace {

Direction parse_direction(const char* function, nb::handle object) {
  const std::string name = string_arg(function, "direction", object);
  if (name == "t2i") return Direction::kT2I;
  if (name == "i2t") return Direction::kI2T;
  if (name == "both") return Direction::kBoth;
  throw ValueError(text(function, ": direction must be t2i, i2t or both, got '", name, "'"));
}

constexpr const char* kFeatureNorms[] = {"softmax",        "l2norm",  "clipped_l2norm", "l1norm",
                                         "clipped_l1norm", "no_norm", "clipped"};
constexpr const char* kAggregations[] = {"LogSumExp", "Max", "Sum", "Mean"};

// The place of a name among those of an enumeration.
template <size_t kCount>
int parse(const char* argument, const char* const (&names)[kCount], nb::handle object) {
  const std::string name = string_arg(XAttnCall::kName, argument, object);
  std::string list;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    list += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw ValueError(text(XAttnCall::kName, ": ", argument, " must be one of ", list, ", got '", name, "'"));
}

}  // namespace

MaxSimCall::MaxSimCall(const char* name, nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g,
                       nb::handle g_lengths, nb::handle g_offsets, nb::handle metric, nb::handle reduce,
                       nb::handle direction, Memory memory)
    : queries(name, "queries", "query", q, q_lengths, q_offsets, memory),
      gallery(name, "gallery", "gallery", g, g_lengths, g_offsets, memory) {
  check_sets(name, "queries", queries, "gallery", gallery);
  args.queries = queries.sets;
  args.gallery = gallery.sets;
  const std::string kind = string_arg(name, "metric", metric);
  check(kind == name_of(Metric::kDot) || kind == name_of(Metric::kCosine), name,
        ": metric must be dot or cosine, got '", kind, "'");
  args.metric = parse_metric(name, kind.c_str());
  const std::string way = string_arg(name, "reduce", reduce);
  check(way == "sum" || way == "mean", name, ": reduce must be sum or mean, got '", way, "'");
  args.reduce = way == "sum" ? Reduce::kSum : Reduce::kMean;
  args.direction = parse_direction(name, direction);
}

MaxSimTopKArgs maxsim_topk_args(const MaxSimCall& call, int64_t k, nb::handle precision) {
  constexpr const char* kName = "maxsim_topk";
  MaxSimTopKArgs args;
  args.forward = call.args;
  const int64_t items = call.args.gallery.items;
  check(items > 0, kName, ": gallery must have at least one item, got shape ", call.gallery.shape());
  check(k >= 1 && k <= items, kName, ": k must be in [1, ", items, "], got ", k);
  args.k = k;
  const std::string mode = string_arg(kName, "precision", precision);
  check(mode == "exact" || mode == "fast", kName, ": precision must be exact or fast, got '", mode, "'");
  args.exact = mode == "exact";
  return args;
}

XAttnCall::XAttnCall(nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
                     nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
                     double lambda_softmax, double lambda_lse, double eps, Memory memory)
    : images(kName, "images", "image", i, i_lengths, i_offsets, memory),
      captions(kName, "captions", "caption", c, c_lengths, c_offsets, memory) {
  check_sets(kName, "images", images, "captions", captions);
  args.images = images.sets;
  args.captions = captions.sets;
  args.direction = parse_direction(kName, direction);
  check(args.direction != Direction::kBoth, kName, ": direction must be t2i or i2t, got 'both'");
  args.feature_norm = static_cast<FeatureNorm>(parse("feature_norm", kFeatureNorms, feature_norm));
  args.aggregation = static_cast<Aggregation>(parse("aggregation", kAggregations, aggregation));
  args.lambda_softmax = lambda_softmax;
  args.lambda_lse = lambda_lse;
  args.eps = eps;
  check(eps >= 0, kName, ": eps must be at least 0, got ", eps);
  check(lambda_lse != 0, kName, ": lambda_lse must not be 0");
}

}  // namespace pycm::bind
