// The tensor-core kernels of the CUDA backend, run on host memory (cuda_machine.h). The suites of
// all backends run them too (`provided_backends`).

#include "../libnatten/src/cuda/fna/fna.h"
#include "cases.h"
#include "cuda_machine.h"
#include "folder.h"
#include "packed.h"

namespace natten_tests {
namespace {

namespace cuda = natten::detail::cuda;

void run_emulated(const natten::Call& call, std::uint64_t seed) {
  run_on_tiles(call, seed, cuda::fna_workspace_bytes, cuda::run_fna<TileLauncher>);
}

void run_packed(const natten::Call& call, const natten::Packing& packing) {
  PackedJob packed(call, packing, cuda::fna_workspace_bytes);
  static TileLauncher launch(1);
  cuda::run_fna(packed.job, launch);
  packed.memory.expect_guard_intact();
}

const bool kProvided = [] {
  provided_backends().push_back({kFnaName, cuda::fna_refuse_reason,
                                 [](const natten::Call& call) { run_emulated(call, 1); },
                                 run_packed});
  return true;
}();

class CudaFna : public testing::TestWithParam<Precision> {
 protected:
  static void TearDownTestSuite() { errors_.print("CUDA, tensor-core kernels: larger problems"); }

  natten::DType dtype() const { return GetParam().dtype; }

  /// Forward and backward against the reference.
  void expect_definition(Case c, std::uint64_t seed = 0,
                         const std::function<void(natten::Call&)>& configure = {}) {
    c.dtype = dtype();
    c.allow_tf32 = GetParam().allow_tf32;
    FusedProblem problem(c);
    natten_tests::expect_definition(problem, errors_, [&](natten::Call call) {
      if (configure) configure(call);
      ASSERT_EQ(cuda::fna_refuse_reason(natten::describe(call)), "");
      ASSERT_NO_THROW(run_emulated(call, seed));
    });
  }

  static ErrorTable errors_;
};
ErrorTable CudaFna::errors_;

TEST_P(CudaFna, Small) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {7, 3, 1, 2, false}};
  c.dim = c.value_dim = 32;
  c.seed = base_seed();
  expect_definition(c);
}

TEST_P(CudaFna, HeadDims) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {13, 3, 1, 2, false}};
  c.heads = 2;
  std::uint64_t seed = base_seed();
  for (const auto& [dim, value_dim] : std::vector<std::pair<int, int>>{{16, 16},
                                                                       {40, 72},
                                                                       {64, 64},
                                                                       {96, 96},
                                                                       {128, 128},
                                                                       {160, 8},
                                                                       {256, 256},
                                                                       {36, 20},
                                                                       {34, 18},
                                                                       {33, 65},
                                                                       {129, 31},
                                                                       {1, 1}}) {
    c.seed = ++seed;
    c.dim = dim;
    c.value_dim = value_dim;
    if (std::max(dim, value_dim) <= cuda::most_dims(natten::size_of(dtype()))) expect_definition(c);
  }
}

/// Tokens that lie at any element, an odd or an even one, and end within a chunk.
TEST_P(CudaFna, TokensAtAnyElement) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {7, 3, 1, 2, false}};
  c.heads = 2;
  c.is_contiguous = false;
  for (std::int64_t dim = 1; dim <= 18; ++dim) {
    c.seed = base_seed() + 50 + static_cast<std::uint64_t>(dim);
    c.dim = dim;
    c.value_dim = 19 - dim;
    if (takes_case(dtype(), c.seed))
      expect_definition(c, 0,
                        [&](natten::Call& call) { call.options.deterministic = dim % 4 < 2; });
  }
}

/// Of 65 to 128 dims registers hold the queries of a forward pass, whose memory values get.
TEST_P(CudaFna, QueriesInRegisters) {
  std::uint64_t seed = base_seed() + 80;
  for (const auto& [dim, value_dim] :
       std::vector<std::pair<int, int>>{{128, 128}, {104, 72}, {40, 96}, {97, 33}})
    for (const bool has_biases : {false, true}) {
      Case c;
      c.axes = {{20, 9, 1, 1, false}, {18, 7, 1, 1, false}};
      c.rpb = has_biases;
      if (!has_biases) {
        c.axes = {{20, 9, 1, 1, false, natten::Boundary::circular}, {18, 7, 1, 1, true}};
        c.key_mask = true;
        c.additional = 3;
      }
      c.seed = ++seed;
      c.dim = dim;
      c.value_dim = value_dim;
      if (takes_case(dtype(), seed / 2)) expect_definition(c, seed % 3);
    }
}

/// Shapes of tiles, and the kernels with 32 rows per warp, which large problems get.
TEST_P(CudaFna, TileShapes) {
  for (int rank = 1; rank <= 3; ++rank) {
    std::uint64_t seed = base_seed() + 100;
    for (int bits = 6; bits <= 7; ++bits)
      cuda::for_each_tile_shape(rank, bits, [&](const cuda::TileShape& rows) {
        const std::uint64_t share = rank == 3 ? 4 : 2;
        if (++seed % share != 0 || !takes_case(dtype(), seed / share)) return;
        Case c = random_case(seed, dtype(), rank);
        c.rpb = false;
        c.heads = c.kv_heads;
        c.scale.reset();
        c.batch = 1;
        Rng rng(seed);
        for (oracle::Axis& axis : c.axes) {
          const bool is_circular = axis.boundary == natten::Boundary::circular;
          const std::int64_t unit = is_circular ? axis.dilation * axis.stride : 1;
          axis.length += ((rank == 1 ? 150 : 4) + unit - 1) / unit * unit;
          if (axis.is_part()) draw_part(rng, axis);
        }
        std::vector<cuda::TileShape> columns;
        cuda::for_each_tile_shape(rank, 6, [&](const auto& shape) { columns.push_back(shape); });
        const cuda::TileShape& chosen = columns[seed % columns.size()];
        const auto tuple = [&](const cuda::TileShape& shape) {
          natten::Tuple t;
          t.size = rank;
          for (int i = 0; i < rank; ++i) t.values[i] = shape.extent(3 - rank + i);
          return t;
        };
        expect_definition(c, seed % 3, [&](natten::Call& call) {
          call.options.query_tile = tuple(rows);
          call.options.key_tile = tuple(chosen);
          if (bits == 6) {
            call.options.backward_query_tile = tuple(rows);
            call.options.backward_key_tile = tuple(chosen);
          }
        });
      });
  }
}

/// The tuner on pairs of tiles, by the products that each takes in place of its time.
TEST(CudaTiles, AreTunedByCost) {
  Case c;
  c.dtype = natten::DType::float16;
  c.axes = {{20, 9, 1, 1, false}, {24, 3, 1, 1, false}};
  c.dim = c.value_dim = 32;
  c.seed = base_seed();
  FusedProblem problem(c);
  for (const bool backward : {false, true}) {
    natten::Call call = backward ? problem.backward() : problem.forward();
    if (backward) run_emulated(problem.forward(), 0);  // for its logsumexp
    const natten::Problem described = natten::describe(call);
    const std::vector<natten::Configuration> offered = cuda::tile_candidates(described, false);
    ASSERT_GE(offered.size(), 4u);
    EXPECT_TRUE(offered[0].is_default());
    std::map<std::string, double> costs;
    const auto cost = [&](const natten::Configuration& configuration) {
      double& known = costs[to_string(configuration)];
      if (known > 0) return known;
      natten::Options& o = call.options;
      (backward ? o.backward_query_tile : o.query_tile) = configuration.query_tile;
      (backward ? o.backward_key_tile : o.key_tile) = configuration.key_tile;
      EXPECT_EQ(cuda::fna_refuse_reason(natten::describe(call)), "");
      EXPECT_EQ(cuda::tile_refusal(natten::describe(call)), "");
      const std::int64_t before = multiply_adds();
      run_emulated(call, 0);
      return known = static_cast<double>(multiply_adds() - before);
    };
    natten::TuningLimits limits;
    limits.seconds = 1e6;  // never what ends it: costs are counted, on a machine that may be busy
    const natten::Choice choice = natten::search(offered, cost, limits);
    EXPECT_EQ(costs.size(), offered.size());
    double least = costs["default"];
    for (const auto& [name, value] : costs) least = std::min(least, value);
    EXPECT_EQ(choice.seconds, costs[to_string(choice.configuration)]);
    EXPECT_LE(choice.seconds, std::max(least, 0.99 * costs["default"])) << "of " << least;
    const Folder folder;
    const natten::Machine machine{"an emulated GPU", 0};
    natten::TuningCache(folder.path()).store(described, "fna", machine, choice);
    natten::TuningCache read(folder.path());
    const auto accepts = [&](const natten::Configuration& configuration) {
      return std::find(offered.begin(), offered.end(), configuration) != offered.end();
    };
    const auto found = read.find(described, "fna", machine, accepts);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->configuration, choice.configuration);
    EXPECT_EQ(found->origin, natten::Origin::cache);
    EXPECT_FALSE(
        natten::TuningCache(folder.path()).find(described, "fna", {"another GPU", 0}, accepts));
  }
  // What the caller demands is not tuned.
  natten::Call call = problem.forward();
  call.options.query_tile = {8, 8};
  EXPECT_EQ(cuda::tile_candidates(natten::describe(call), true).size(), 1u);
}

TEST(CudaTiles, UnsupportedShapesAreRefusedWithTheSupportedOnes) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {13, 3, 1, 2, false}};
  FusedProblem problem(c);
  const auto refusal = [&](natten::Tuple query_tile, natten::Tuple key_tile) {
    natten::Call call = problem.forward();
    call.options.query_tile = query_tile;
    call.options.key_tile = key_tile;
    return cuda::tile_refusal(natten::describe(call));
  };
  EXPECT_EQ(refusal({8, 8}, {4, 16}), "");
  EXPECT_EQ(refusal({16, 8}, {}), "");
  EXPECT_NE(refusal({8, 7}, {}).find("q_tile_shape: got (8, 7); supported are"), std::string::npos);
  EXPECT_NE(refusal({}, {8, 16}).find("kv_tile_shape: got (8, 16); supported are"),
            std::string::npos);
  EXPECT_NE(refusal({}, {8, 16}).find("(64, 1), (32, 2), (16, 4), (8, 8)"), std::string::npos);
  EXPECT_NE(refusal({1 << 20, 1 << 20}, {}).find("q_tile_shape"), std::string::npos);
}

/// Takes the place of a launcher on a device whose multiprocessors have so much shared memory.
struct Planner {
  int bytes;
  int rows = 0, of_block = 0;  ///< of the last tile kernel that has been enqueued

  template <class T, int kDims, int kM, cuda::TilePass kPass>
  void operator()(const cuda::TileKernel<T, kDims, kM, kPass>&, std::int64_t, int shared_bytes) {
    rows = cuda::TileTraits<T, kDims, kM, kPass>::kRows;
    of_block = shared_bytes;
  }
  template <class Kernel>
  void operator()(const Kernel&, std::int64_t, int = 0) {}
  void clear(void*, std::size_t) {}
  int shared_bytes() const { return bytes; }
};

/// Compute capability 8.0 has 164 KB per multiprocessor, 8.6, 8.9 and 12.0 have 100, and 9.0 and
/// 10.0 have 228. Rows are 128 where that leaves room for as many blocks as 64 do.
TEST(CudaFnaChoice, TilesFitIntoTheSharedMemoryOfTheDevice) {
  const auto plan = [](natten::DType dtype, std::int64_t dim, int kilobytes) {
    natten::Call call;
    const std::int64_t shape[] = {1, 256, 256, 24, dim};
    call.tensors.query = call.tensors.key = call.tensors.value =
        natten::contiguous_view(nullptr, dtype, {}, shape, 5);
    call.neighborhood.kernel_size = {80, 80};
    call.options.allow_tf32 = true;
    Planner planner{1024 * kilobytes};
    cuda::run_fna(natten::detail::Job{natten::describe(call), call.tensors, nullptr}, planner);
    EXPECT_LE(planner.of_block, cuda::kMostSharedBytes);
    return planner;
  };
  for (const natten::DType dtype : {natten::DType::bfloat16, natten::DType::float32})
    for (const std::int64_t dim : {32, 64, 96, 128, 192, 256}) {
      if (dim > cuda::most_dims(natten::size_of(dtype))) continue;
      SCOPED_TRACE(dim);
      const bool has_wide = dim <= cuda::most_wide_dims(natten::size_of(dtype));
      for (const int kilobytes : {164, 228})
        EXPECT_EQ(plan(dtype, dim, kilobytes).rows, has_wide ? 128 : 64);
      const bool has_room = natten::size_of(dtype) == 4 || (dim != 96 && dim != 128);
      const Planner small = plan(dtype, dim, 100);
      EXPECT_EQ(small.rows, has_wide && has_room ? 128 : 64);
      if (!has_room) {
        EXPECT_EQ(cuda::blocks_beside(small.of_block, small.bytes), 2);
      }
    }
}

TEST(CudaFnaChoice, Float32OnlyInTf32AndWithItsDims) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}};
  c.dtype = natten::DType::float32;
  const auto refusal = [&] {
    FusedProblem problem(c);
    return cuda::fna_refuse_reason(natten::describe(problem.forward()));
  };
  EXPECT_EQ(refusal(), "computes float32 in TF32 only, which the call does not allow");
  c.allow_tf32 = true;
  EXPECT_EQ(refusal(), "");
  c.dim = 129;
  EXPECT_EQ(refusal(), "head dims 129 and 4; the most is 128 for float32");
  c.dtype = natten::DType::float64;
  EXPECT_EQ(refusal(), "does not compute float64");
}

/// What a forward pass multiplies, relative to what the windows hold: whole tiles, but for those
/// that a warp's rows do not see. Tiles of columns that lay on a fixed grid would make it 1.36 for
/// the second case and 2.04 for the third.
TEST(CudaTiles, LargeWindowsAreCoveredClosely) {
  struct Example {
    std::vector<std::int64_t> lengths, kernel_size, stride;
    double most;
  };
  for (const Example& e : std::vector<Example>{
           {{32768}, {2048}, {1}, 1.03},
           {{256, 256}, {80, 80}, {1, 1}, 1.15},
           {{30, 48, 80}, {18, 24, 24}, {1, 1, 1}, 1.41},
           {{30, 48, 80}, {18, 24, 24}, {16, 8, 8}, 1.0},
       }) {
    const int rank = static_cast<int>(e.lengths.size());
    std::vector<std::int64_t> shape = e.lengths;
    shape.insert(shape.begin(), 1);
    shape.insert(shape.end(), {24, 128});
    natten::Call call;
    call.tensors.query = call.tensors.key = call.tensors.value = natten::contiguous_view(
        nullptr, natten::DType::bfloat16, {}, shape.data(), static_cast<int>(shape.size()));
    call.neighborhood.kernel_size = natten::Tuple(e.kernel_size.begin(), rank);
    call.neighborhood.stride = natten::Tuple(e.stride.begin(), rank);
    const natten::Problem p = natten::describe(call);
    cuda::PassGrid grid = cuda::grid_of(p, cuda::Rows::queries);
    cuda::choose_tiles(grid, rank, 7, 6, cuda::TileCost(2, 128));

    constexpr int kRows = 128, kWarps = 4, kWarpRows = kRows / kWarps;
    double executed = 0;
    for (std::int64_t block = 0; block < grid.blocks_per_head(); ++block) {
      const cuda::RowTile rows = cuda::row_tile(grid, static_cast<std::uint32_t>(block));
      cuda::PlaceInterval memory[kRows + 2];
      const cuda::SeenIntervals intervals{memory, grid.row_tile};
      intervals.compute(grid, cuda::Rows::queries, rows, 0, 1, [&](int a) { return grid.axes[a]; });
      const auto bounds = [&](int axis, int first, int count) {
        return cuda::bounds_of(intervals, grid.row_tile, rows, axis, first, first + count - 1);
      };
      cuda::ColumnTiles tiles{{}, {}, 0, 1};
      cuda::Bounds of_warps[kWarps][natten::kMaxRank];
      for (int a = 0; a < natten::kMaxRank; ++a) {
        tiles.set_axis(a, bounds(a, 0, kRows),
                       grid.columns(a, grid.places[a].column_length, rows.group[a]),
                       grid.column_tile);
        for (int w = 0; w < kWarps; ++w) of_warps[w][a] = bounds(a, w * kWarpRows, kWarpRows);
      }
      for (int i = 0; i < tiles.count(); ++i) {
        const cuda::ColumnTile tile = tiles.at(i, grid);
        for (const auto& of_warp : of_warps)
          if (cuda::overlap_of(of_warp, grid.column_tile, tile.origin) != cuda::Overlap::none)
            executed += kWarpRows * grid.column_tile.size();
      }
    }
    EXPECT_LE(executed / static_cast<double>(p.queries() * p.window_size()), e.most);

    // natten::work_of multiplies what it counts along each axis.
    call.tensors.output = natten::expected(p, &natten::Tensors::output);
    const auto tile_of = [&](const cuda::TileShape& shape) {
      natten::Tuple tile;
      for (tile.size = 0; tile.size < rank; ++tile.size)
        tile.values[index(tile.size)] = shape.extent(natten::kMaxRank - rank + tile.size);
      return tile;
    };
    call.options.query_tile = tile_of(grid.row_tile);
    call.options.key_tile = tile_of(grid.column_tile);
    for (natten::TensorView natten::Tensors::*tensor :
         {&natten::Tensors::query, &natten::Tensors::key, &natten::Tensors::value,
          &natten::Tensors::output})
      (call.tensors.*tensor).device = {natten::DeviceType::cuda, -1};
    const natten::PassWork work = natten::work_of(call).at(0);
    EXPECT_EQ(work.weights, executed * static_cast<double>(p.heads));
  }
}

#ifdef NATTEN_PTX_FILES
/// Windows of published models are small, and what surrounds the products decides. No more
/// instructions than there were, with a tenth to spare (docs/performance.md).
TEST(CudaFnaCounts, OfSmallWindows) {
  using natten::DType;
  struct Example {
    DType dtype;
    std::int64_t length, window, dim;
    double forward, backward;  // thousands of instructions; 0: not counted
    bool rpb = false;
    std::int64_t heads = 1;
  };
  for (const Example& e : std::vector<Example>{
           {DType::bfloat16, 128, 13, 64, 3662, 0},
           {DType::bfloat16, 56, 7, 32, 387, 1755},
           {DType::bfloat16, 40, 13, 64, 377, 1601},
           {DType::bfloat16, 40, 13, 128, 533, 0},
           {DType::float32, 56, 7, 32, 561, 2658},
           // Tokens at multiples of 16, 8, 4 and 2 bytes.
           {DType::bfloat16, 56, 7, 40, 499, 2327},
           {DType::bfloat16, 56, 7, 36, 1049, 3245},
           {DType::bfloat16, 56, 7, 34, 1176, 3528},
           {DType::bfloat16, 56, 7, 33, 1497, 4320},
           {DType::float32, 56, 7, 33, 1938, 6060},
           {DType::bfloat16, 40, 13, 64, 662, 16765, true},
           // Enough blocks for 128 rows in each.
           {DType::bfloat16, 56, 7, 32, 3412, 0, false, 10},
       }) {
    Case c;
    c.dtype = e.dtype;
    c.allow_tf32 = true;
    c.axes = {{e.length, e.window, 1, 1, false}, {e.length, e.window, 1, 1, false}};
    c.dim = c.value_dim = e.dim;
    c.heads = c.kv_heads = e.heads;
    c.rpb = e.rpb;
    c.seed = base_seed();
    FusedProblem problem(c);
    const auto expect_at_most = [&](const char* pass, const natten::Call& call, double thousands) {
      const ptx::WarpCounts before = ptx::warp_counts();
      ASSERT_NO_THROW(run_emulated(call, 0));
      const ptx::WarpCounts after = ptx::warp_counts();
      const auto count = static_cast<double>(after.instructions - before.instructions);
      const auto products = static_cast<double>(after.products - before.products);
      std::cout << natten::name_of(e.dtype) << ", " << e.length << "^2, window " << e.window
                << "^2, head dim " << e.dim << (e.rpb ? ", biases, " : ", ")
                << (e.heads > 1 ? std::to_string(e.heads) + " heads, " : "") << pass << ": "
                << count / 1e3 << " thousand instructions, " << count / products
                << " per product of matrices\n";
      EXPECT_LE(count, 1.1 * 1e3 * thousands);
    };
    expect_at_most("forward", problem.forward(), e.forward);
    if (e.backward > 0) expect_at_most("backward", problem.backward(), e.backward);
  }
}
#endif

/// What natten::work_of counts is what the kernels multiply.
TEST_P(CudaFna, WorkIsCounted) {
  std::uint64_t seed = base_seed() + 6000;
  for (int rank = 1; rank <= 3; ++rank)
    for (int i = 0; i < 6; ++i) {
      Case c = random_case(++seed, dtype(), rank);
      c.batch = 1;
      c.rpb = c.key_mask = c.is_contiguous = false;
      c.additional.reset();
      c.allow_tf32 = GetParam().allow_tf32;
      std::ostringstream text;
      text << c;
      SCOPED_TRACE(text.str());
      FusedProblem problem(c);
      for (const bool backward : {false, true}) {
        natten::Call call = backward ? problem.backward() : problem.forward();
        call.options.deterministic = i % 2 == 0;
        const std::int64_t before = multiply_adds();
        ASSERT_NO_THROW(run_emulated(call, 0));
        const auto done = static_cast<double>(multiply_adds() - before);
        for (const natten::Role& role : natten::roles_of(call.op))
          (call.tensors.*role.tensor).device = {natten::DeviceType::cuda, -1};
        double counted = 0;
        for (const natten::PassWork& pass : natten::work_of(call)) counted += pass.executed;
        EXPECT_EQ(counted, done);
      }
    }
}

/// Words of masks against the definition, bit by bit.
TEST(CudaTiles, MaskWordsHaveTheColumnsOfTheSpans) {
  Rng rng(base_seed());
  for (int i = 0; i < 100000; ++i) {
    const int bits = chance(rng, 0.5) ? 6 : 5;
    cuda::TileShape tile{};
    tile.bits[2] = static_cast<int>(uniform(rng, 0, bits));
    tile.bits[1] = static_cast<int>(uniform(rng, 0, bits - tile.bits[2]));
    tile.bits[0] = bits - tile.bits[1] - tile.bits[2];
    cuda::PlaceInterval seen[natten::kMaxRank];
    int origin[natten::kMaxRank];
    for (int a = 0; a < natten::kMaxRank; ++a) {
      origin[a] = static_cast<int>(uniform(rng, 0, 100));
      seen[a].begin = origin[a] + static_cast<int>(uniform(rng, -80, 80));
      seen[a].end = seen[a].begin + static_cast<int>(uniform(rng, 0, 100));
    }
    const std::uint64_t word = cuda::MaskWords(tile).word(tile, seen, origin);
    for (int column = 0; column < tile.size(); ++column) {
      bool expected = true;
      for (int a = 0; a < natten::kMaxRank; ++a) {
        const int position = origin[a] + tile.offset(column, a);
        expected = expected && seen[a].begin <= position && position < seen[a].end;
      }
      ASSERT_EQ(word >> column & 1, expected) << "case " << i << ", column " << column;
    }
  }
}

/// Tiles of columns that cross a seam, hold hidden columns or reach past the last one that is
/// given, where tokens are copied in chunks of 16 bytes. Nothing reads what is hidden.
TEST_P(CudaFna, ChunksOfBordersPartsAndMasks) {
  std::uint64_t seed = base_seed() + 4000;
  for (int rank = 1; rank <= 3; ++rank)
    for (int i = 0; i < 12; ++i) {
      Rng rng(++seed);
      Case c = random_case(seed, dtype(), rank);
      for (oracle::Axis& axis : c.axes) {
        axis = oracle::Axis{uniform(rng, 2, rank == 1 ? 200 : rank == 2 ? 20 : 8)};
        axis.dilation = uniform(rng, 1, 2);
        axis.length -= axis.length % axis.dilation;
        axis.kernel_size = uniform(rng, 1, axis.length / axis.dilation);
        draw_border(rng, axis);
        if (chance(rng, 0.6)) draw_part(rng, axis);
      }
      c.batch = 2;
      c.kv_heads = 1;
      c.heads = uniform(rng, 1, 2);
      c.dim = 8 * uniform(rng, 1, 5);
      c.value_dim = 8 * uniform(rng, 1, 5);
      c.key_mask = chance(rng, 0.6);
      c.is_contiguous = true;
      c.allow_tf32 = GetParam().allow_tf32;
      FusedProblem problem(c);
      const bool deterministic = chance(rng, 0.6);
      const std::int64_t keys = volume(key_lengths_of(c));
      if (const Dense mask = mask_of(c); mask.is_given())
        for (std::int64_t token = 0; token < c.batch * keys; ++token) {
          if (mask[token % mask.size()] != 0) continue;
          for (std::int64_t d = 0; d < c.dim; ++d)
            problem.buffers.key.set(token * c.dim + d, std::nan(""));
          for (std::int64_t d = 0; d < c.value_dim; ++d)
            problem.buffers.value.set(token * c.value_dim + d, HUGE_VAL);
        }
      natten_tests::expect_definition(problem, errors_, [&](natten::Call call) {
        call.options.deterministic = deterministic;
        ASSERT_EQ(cuda::fna_refuse_reason(natten::describe(call)), "");
        ASSERT_NO_THROW(run_emulated(call, seed % 3));
      });
    }
}

/// Keys that are given before the grid's first token hold anything. Tiles begin past them, even
/// where they begin before the first key that is seen.
TEST_P(CudaFna, PaddingBeforeTheGrid) {
  Case c;
  c.seed = base_seed() + 4500;
  c.dtype = dtype();
  c.allow_tf32 = GetParam().allow_tf32;
  oracle::Axis axis{200, 70, 1, 1, false};
  axis.given_queries = 40;
  axis.key_offset = -3;
  axis.given_keys = 129;  // two tiles of 64 that begin in the padding would end with the last one
  c.axes = {axis};
  c.dim = c.value_dim = 32;
  FusedProblem problem(c);
  for (std::int64_t i = 0; i < -axis.key_offset * c.dim; ++i) {
    problem.buffers.key.set(i, std::nan(""));
    problem.buffers.value.set(i, HUGE_VAL);
  }
  natten_tests::expect_definition(
      problem, errors_, [&](natten::Call call) { ASSERT_NO_THROW(run_emulated(call, 1)); });
}

/// A tile's rows that do not exist have scores of 0, whose weights overflow where those of all that
/// exist are so low. Nothing of them may reach queries.
TEST_P(CudaFna, LowScoresWhereRowsAreMissing) {
  Case c;
  c.seed = base_seed() + 5000;
  c.axes = {{70, 70, 1, 1, false}};  // every tile of keys sees all of the first tile of queries
  c.dim = c.value_dim = 32;
  c.rpb = true;
  c.dtype = dtype();
  c.allow_tf32 = GetParam().allow_tf32;
  FusedProblem problem(c);
  Buffers& b = problem.buffers;
  for (std::int64_t i = 0; i < b.rpb.view().size(); ++i) b.rpb.set(i, -200);
  natten_tests::expect_definition(problem, errors_, [&](natten::Call call) {
    call.options.deterministic = false;
    run_emulated(call, 1);
  });
}

/// Gradients of few additional tokens, which blocks find in parts of the queries.
TEST_P(CudaFna, AdditionalTokensOfManyQueries) {
  for (const bool deterministic : {true, false}) {
    Case c;
    c.seed = base_seed() + 2000;
    c.axes = {{33, 3, 1, 1, false}, {32, 3, 1, 2, true}};
    c.heads = 2;
    c.kv_heads = 1;
    c.dim = 24;
    c.value_dim = 20;
    c.additional = 70;
    c.is_contiguous = false;
    c.dtype = dtype();
    FusedProblem problem(c);
    EXPECT_EQ(cuda::additional_splits(natten::describe(problem.backward())), 2);
    expect_definition(c, deterministic ? 1 : 2,
                      [&](natten::Call& call) { call.options.deterministic = deterministic; });
  }
}

/// In several tiles of rows and columns, of which the last ones hold tokens of other examples.
TEST_P(CudaFna, ExamplesOfDifferentLengths) {
  for (std::uint64_t i = 0; i < 14; ++i) {
    PackedCase packed =
        packed_case(base_seed() * 61 + i, GetParam(), i % 3 == 0 ? 20 : 200, i % 2 == 0);
    Case& c = packed.c;
    if (!takes_case(dtype(), i) || !packed.is_one_job() || c.keys == 0) continue;
    c.is_contiguous = i % 4 != 3;
    if (c.is_contiguous) c.dim = c.value_dim = 8 * (1 + static_cast<std::int64_t>(i) % 5);
    expect_examples(packed, errors_, run_packed);
  }
}

/// One pass over the keys for all gradients.
TEST_P(CudaFna, NotDeterministic) {
  std::uint64_t seed = base_seed() + 1000;
  for (int rank = 1; rank <= 3; ++rank)
    for (int i = 0; i < 12; ++i) {
      Case c = random_case(++seed, dtype(), rank);
      if (i == 0) c.dim = c.value_dim = 128;
      expect_definition(c, static_cast<std::uint64_t>(i % 3),
                        [](natten::Call& call) { call.options.deterministic = false; });
    }
}

TEST_P(CudaFna, Random) {
  std::uint64_t seed = base_seed();
  for (int rank = 1; rank <= 3; ++rank)
    for (int i = 0; i < 40; ++i) {
      Case c = random_case(++seed, dtype(), rank);
      if (!takes_case(dtype(), seed)) continue;
      expect_definition(c, static_cast<std::uint64_t>(i % 3));
    }
}

TEST_P(CudaFna, AllScoresInfinite) {
  for (const bool deterministic : {true, false})
    expect_zeros_where_all_scores_are_infinite(GetParam(), [&](natten::Call call) {
      call.options.deterministic = deterministic;
      run_emulated(call, 1);
    });
}

/// Where scores are large, logsumexp rounds to 1e-5 and more, and a row's largest weight comes with
/// any of its tiles of keys, of which there are several along a line.
TEST_P(CudaFna, LargeScores) {
  std::uint64_t seed = base_seed() + 3000;
  for (const double scores : {1., 30., 300., 3000.})
    for (const bool is_line : {false, true}) {
      Case c;
      c.seed = ++seed;
      c.dtype = dtype();
      c.allow_tf32 = GetParam().allow_tf32;
      c.axes = {{18, 7, 1, 1, false}, {17, 7, 1, 1, false}};
      if (is_line) c.axes = {{330, 260, 1, 1, false}};
      c.heads = c.kv_heads = 2;
      c.dim = c.value_dim = 32;
      c.scale = scores / std::sqrt(static_cast<double>(c.dim));
      FusedProblem problem(c);
      Buffers& b = problem.buffers;
      for (Buffer* x : {&b.query, &b.key, &b.value, &b.grad_output})  // for exact products in TF32
        for (std::int64_t i = 0; i < x->view().size(); ++i)
          x->set(i, cuda::round_to_tf32(static_cast<float>(x->get(i))));
      natten_tests::expect_definition(problem, errors_,
                                      [](const natten::Call& call) { run_emulated(call, 1); });
    }
}

/// Strides of biases that 32 bits do not hold are refused, and another backend runs the problem.
TEST(CudaFnaChoice, BiasesFarApart) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {7, 3, 1, 1, false}};
  c.dtype = natten::DType::bfloat16;
  c.rpb = true;
  FusedProblem problem(c);
  for (natten::Op op : {natten::Op::attention_forward, natten::Op::attention_backward}) {
    problem.provide_logsumexp();
    natten::Call call = problem.call(op);
    const auto refusal = [&](std::int64_t stride) {
      call.tensors.rpb.strides[1] = stride;
      return cuda::fna_refuse_reason(natten::describe(call));
    };
    EXPECT_EQ(refusal(5), "");
    EXPECT_EQ(refusal(1 << 27), "");
    EXPECT_EQ(refusal(-(1 << 27)), "");
    for (const std::int64_t stride : {std::int64_t{1} << 28, -(std::int64_t{1} << 28)})
      EXPECT_EQ(refusal(stride),
                "rpb: its strides span 2147483652 elements within a head; the most is 2^31 - 1");
    EXPECT_EQ(cuda::simt_refuse_reason(natten::describe(call)), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Precisions, CudaFna,
                         testing::Values(Precision(natten::DType::bfloat16),
                                         Precision(natten::DType::float16),
                                         Precision(natten::DType::float32, true)),
                         [](const auto& info) { return info.param.name(); });

}  // namespace
}  // namespace natten_tests
