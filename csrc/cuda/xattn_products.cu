// xattn_score's products, steps 2 and 3 of xattn.cu: tiles of 128 x 128 by the tensor cores, in fp64 of 16 x 16, a thread a
// product. Operations: 2 A B D, three times that in fp32 (maxsim_product.cuh). Bytes: x and y once per 128 of the other side
// through L2, 4 or 8 A B written. Limits: the fp64 tiles read each vector 16 times from the first cache; parts are small.
#include "cuda/maxsim_product.cuh"
#include "cuda/xattn_parts.cuh"

namespace pycm::cuda {
namespace {

struct ProductShared {
  ProductStages stages;
  int64_t row_offset[kRows], column_offset[kColumns];
};

// The tile's first row and column, in positions of the part; whether there is anything to do.
struct Tile {
  Part rows, columns;
  int64_t row, column;
  bool needed;
};

__device__ inline Tile find_tile(const Product& args, int edge) {
  Tile tile{find_part(args.rows, args.row_part), find_part(args.columns, args.column_part), int64_t{blockIdx.y} * edge,
            int64_t{blockIdx.x} * edge, true};
  const int64_t row = tile.rows.begin + tile.row, column = tile.columns.begin + tile.column;
  tile.needed = row < tile.rows.end && column < tile.columns.end;
  if (!args.gram || !tile.needed || row == column) return tile;
  // Some item reaches from the one range of positions into the other.
  const int64_t low = row < column ? row : column, high = row < column ? column : row;
  tile.needed = item_at(args.rows.sets, low + edge - 1) == item_at(args.rows.sets, high);
  return tile;
}

template <Mma M>
__global__ void __launch_bounds__(kThreads, 2) products(const Product args, float* out) {
  ProductShared& shared = *reinterpret_cast<ProductShared*>(dynamic_shared());
  const Tile tile = find_tile(args, kRows);
  if (!tile.needed) return;
  const int64_t mine_row = tile.rows.begin + tile.row + threadIdx.x,
                mine_column = tile.columns.begin + tile.column + threadIdx.x;
  shared.row_offset[threadIdx.x] = mine_row < tile.rows.end ? vector_offset(args.rows.sets, mine_row) : -1;
  shared.column_offset[threadIdx.x] =
      mine_column < tile.columns.end ? vector_offset(args.columns.sets, mine_column) : -1;
  __syncthreads();
  const int lines = static_cast<int>((args.rows.sets.dim * kMmaBytes<M> + kLine - 1) / kLine);
  const auto load = [&](int line) {
    load_line<M>(shared.stages.rows[line % kStages], args.rows.sets, args.rows_aligned, shared.row_offset, line);
    load_line<M>(shared.stages.columns[line % kStages], args.columns.sets, args.columns_aligned, shared.column_offset,
                 line);
    cp_async_commit();
  };
  float sum[2][kGroups][4];
  load(0);
  for (int line = 0; line < lines; ++line) {
    cp_async_wait<0>();
    __syncthreads();
    if (line + 1 < lines) load(line + 1);
    multiply_line<M>(sum, shared.stages, line % kStages, line, args.rows.sets.dim);
  }
  const int lane = threadIdx.x % kWarp, first = lane % 4 * 2;
  const int columns = static_cast<int>(tile.columns.end - tile.columns.begin - tile.column);
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const int64_t row = tile.row + threadIdx.x / kWarp * 32 + half * 8 + lane / 4;
    if (tile.rows.begin + row >= tile.rows.end) continue;
    float* const to = out + row * args.pitch + tile.column + first;
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (j * kGroup + first + e < columns) to[j * kGroup + e] = sum[half / 2][j][half % 2 * 2 + e];
  }
}

constexpr int kEdge = 16;  // of the fp64 kernel's tile, one thread per product

__global__ void __launch_bounds__(kEdge* kEdge) products_fp64(const Product args, double* out) {
  const Tile tile = find_tile(args, kEdge);
  const int64_t row = tile.row + threadIdx.x / kEdge, column = tile.column + threadIdx.x % kEdge;
  if (!tile.needed || tile.rows.begin + row >= tile.rows.end || tile.columns.begin + column >= tile.columns.end) return;
  const VectorSets &x = args.rows.sets, &y = args.columns.sets;
  const int64_t x_offset = vector_offset(x, tile.rows.begin + row),
                y_offset = vector_offset(y, tile.columns.begin + column);
  if (x_offset < 0 || y_offset < 0) return;
  double sum = 0;
  for (int64_t d = 0; d < x.dim; ++d)
    sum += load_double(x, x_offset + d * x.dim_stride) * load_double(y, y_offset + d * y.dim_stride);
  out[row * args.pitch + column] = sum;
}

}  // namespace

void launch_xattn_products(const Product& args, double* out, void* stream, const char* name) {
  launch(products_fp64,
         Grid{dim3(blocks(args.columns.capacity, kEdge), blocks(args.rows.capacity, kEdge)), dim3(kEdge * kEdge), 1, 0,
              stream},
         name, args, out);
}

void launch_xattn_products(const Product& args, float* out, void* stream, const char* name) {
  const Grid grid{dim3(blocks(args.columns.capacity, kColumns), blocks(args.rows.capacity, kRows)), dim3(kThreads), 1,
                  static_cast<int64_t>(sizeof(ProductShared)), stream};
  switch (args.rows.sets.dtype) {
    case DType::kFloat16: return launch(products<Mma::kF16>, grid, name, args, out);
    case DType::kBFloat16: return launch(products<Mma::kBF16>, grid, name, args, out);
    default: return launch(products<Mma::kTF32>, grid, name, args, out);
  }
}

}  // namespace pycm::cuda
