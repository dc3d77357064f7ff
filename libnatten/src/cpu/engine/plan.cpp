#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace natten::detail::cpu::engine {
namespace {

using simd::kMostVectors;

// Packed columns and rows of a thread: strips are as long as fits. Heads take turns, and what one
// of them needs at a time fits the L2 cache, unless strips would pack more than 1.5 columns per
// row.
constexpr std::size_t kMostBytes = 3 << 20, kMostBytesOfHead = 3 << 18;
// The same of plans that are asked for.
constexpr std::size_t kMostBytesAskedFor = 2 * kMostBytes;
// Of a line that is cut into pieces.
constexpr std::int64_t kPieceColumns = 256;
constexpr std::int64_t kLongestStrip = 256, kLongestStripOfPieces = 128, kShortestStrip = 16;
// At least, to even out threads that start late.
constexpr std::int64_t kItemsPerThread = 2;
// How much of an item's time is lost to these.
constexpr double kLateStart = 0.25;
// For which two passes with partial sums are cut, whatever threads there are: how they are cut
// shows in the result.
constexpr int kThreadsOfPartialSums = 16;
// Units with partial sums, of all batch entries and heads, that are enough for any machine.
constexpr std::int64_t kUnitsOfPartialSums = 32;
// How columns' gradients are summed shows in the result, so rows are cut for any number of threads
// alike: up to so many, and one for so many rows of all heads.
constexpr double kMostThreadsOfColumnSums = 64, kRowsPerThread = 1024;
/// Elements that a thread may have of a ring with sums of columns and the rows at hand, and how
/// long two passes take by the time of one with such a ring.
struct RingLimit {
  std::int64_t above, most;
  double two_passes;
};
// 4 MiB of float32.
constexpr RingLimit kRing{0, 1 << 20, 1.4};
// 16 MiB, for large windows: rows of a strip share a piece of the ring at a time. Two passes would
// pack pieces of lines again and again.
constexpr RingLimit kRingInPieces{kRing.most, 1 << 22, 2};
// A line takes as long as with so many columns more.
constexpr double kColumnsOfLine = 8;
// Of a ring larger than kRing, elements that the L2 cache holds beside other things.
constexpr std::int64_t kPieceElements = 1 << 17;
// Of the weights of a block of queries, and their gradients.
constexpr std::int64_t kMostKeptBytes = 8 << 20;
constexpr std::int64_t kPaddingOfLine = std::int64_t{2} * simd::kPaddingSteps;
// Bytes of partial sums, if there is more than one of each gradient.
constexpr std::size_t kMostPartialBytes = 16 << 20;

ColumnShape column_shape(const Plan& plan) {
  const Problem& p = plan.problem();
  const PassKind kind = plan.kind();
  ColumnShape column;
  column.hidden = p.has_key_mask && !rows_are_keys(kind);
  if (kind == PassKind::av || kind == PassKind::av_transpose) {
    column.plain = plan.padded;
    return column;
  }
  column.transposed = plan.elements(p.head_dim);
  if (kind == PassKind::qk) return column;
  if (kind != PassKind::backward_query) column.plain = plan.value_padded;
  if (kind == PassKind::forward) return column;
  column.transposed_grad = plan.elements(p.value_dim);
  column.plain_grad = plan.padded;
  column.statistics = kind == PassKind::backward_key;
  if (plan.sums_columns) {
    // Also if they are not wanted, so that the others keep their bits.
    column.grad_key = plan.padded;
    column.grad_value = plan.value_padded;
  }
  return column;
}

/// Of a packed column.
std::int64_t column_elements(const Plan& plan) {
  const ColumnShape& c = plan.column;
  return round_up(c.transposed, plan.width) + round_up(c.transposed_grad, plan.width) + c.plain +
         c.plain_grad + c.grad_key + c.grad_value;
}

/// Of the packed columns of some heads and the rows that see them, with strips of `rows`.
std::size_t packed_bytes(const Plan& plan, std::int64_t rows, std::int64_t column_heads,
                         std::int64_t row_heads) {
  const std::int64_t columns =
      column_heads * plan.ring0 * plan.ring1 * plan.grid.most_columns(2, rows);
  return static_cast<std::size_t>(column_elements(plan) *
                                  (columns + row_heads * plan.stack * rows)) *
         plan.element_bytes;
}
std::size_t packed_bytes(const Plan& plan, std::int64_t rows) {
  return packed_bytes(plan, rows, plan.column_heads, plan.row_heads);
}

/// Of a ring and the rows that see it, without sums of columns.
std::size_t most_ring_bytes(const Plan& plan) {
  return plan.has_pieces() ? kRingInPieces.most * plan.element_bytes : kMostBytes;
}

/// Has `count` heads handled together, or the most below that fit the groups that share a key head.
void set_heads(Plan& plan, std::int64_t count) {
  const Problem& p = plan.problem();
  plan.row_heads = plan.column_heads = count;
  if (p.heads == p.kv_heads) return;
  // Heads of one key head; the gradients of that are added up head by head.
  if (plan.kind() == PassKind::backward_key) plan.row_heads = 1;
  while (p.heads / p.kv_heads % plan.row_heads != 0) --plan.row_heads;
  plan.column_heads = 1;
}
void set_fewer_heads(Plan& plan) { set_heads(plan, (plan.row_heads + 1) / 2); }

/// Has blocks of rows go through a ring that the L2 cache does not hold piece by piece.
void cut_ring(Plan& plan) {
  plan.piece_columns = plan.grid.most_columns(2, plan.strip);
  plan.piece_lines = std::clamp<std::int64_t>(
      kPieceElements / (column_elements(plan) * plan.piece_columns), 1, plan.lines);
}
/// Does so if such a ring has room, and pieces are few lines that the cache can hold.
bool fit_ring_in_pieces(Plan& plan) {
  Plan found = plan;
  found.in_pieces = false;
  cut_ring(found);
  if (!found.has_pieces() || packed_bytes(found, found.strip) > most_ring_bytes(found) ||
      column_elements(found) * found.piece_columns > 2 * kPieceElements)
    return false;
  plan = found;
  return true;
}

/// Chooses heads, strips and pieces such that what is packed fits the cache.
void fit_cache(Plan& plan, const Configuration& asked) {
  const std::int64_t least_strip =
      std::max(kShortestStrip, plan.stack > 1 ? plan.width : kMostVectors * plan.width);
  const std::int64_t longest = plan.grid.most_rows(2);
  const std::int64_t most_heads =
      asked.heads > 0 ? std::min<std::int64_t>(asked.heads, simd::kMostHeads) : simd::kMostHeads;
  // Heads of a token are neighbors in memory: it is read in order where they are packed together.
  // Unfused tensors are heads-first.
  set_heads(plan,
            is_fused(plan.kind()) ? std::clamp<std::int64_t>(plan.grid.heads(), 1, most_heads) : 1);
  while (asked.heads == 0 && plan.column_heads > 1 && packed_bytes(plan, least_strip) > kMostBytes)
    set_fewer_heads(plan);
  plan.strip =
      round_up(std::min(longest, asked.strip > 0 ? asked.strip : kLongestStrip), plan.width);
  const auto is_too_long = [&](std::int64_t strip, std::int64_t shorter) {
    return packed_bytes(plan, strip) > kMostBytes ||
           (packed_bytes(plan, strip, 1, 1) > kMostBytesOfHead &&
            2 * plan.grid.most_columns(2, shorter) <= 3 * shorter);
  };
  while (asked.strip == 0 && plan.strip > least_strip) {
    const std::int64_t shorter = std::max(least_strip, round_up(plan.strip / 2, plan.width));
    if (!is_too_long(plan.strip, shorter)) break;
    plan.strip = shorter;
  }
  plan.piece_lines = plan.lines;
  plan.in_pieces =
      packed_bytes(plan, plan.strip) > (asked.is_default() ? kMostBytes : kMostBytesAskedFor);
  if (!plan.in_pieces) {
    plan.piece_columns = plan.grid.most_columns(2, plan.strip);
    return;
  }
  plan.row_heads = plan.column_heads = 1;
  // Packing is paid by the rows of a strip, so strips are long where columns are cut.
  plan.strip = round_up(std::min(longest, kLongestStripOfPieces), plan.width);
  if (is_fused(plan.kind()) && fit_ring_in_pieces(plan)) return;
  plan.piece_columns = std::min(plan.grid.most_columns(2, plan.strip), kPieceColumns);
  plan.piece_lines =
      std::max<std::int64_t>(1, static_cast<std::int64_t>(kMostBytes / 4 / plan.element_bytes) /
                                    (column_elements(plan) * plan.piece_columns));
}

/// Sets how many lines of axes 0 and 1 are packed together; tells whether they fit.
bool fits_ring(Plan& plan, std::int64_t lines0, std::int64_t lines1) {
  plan.ring0 = lines0;
  plan.ring1 = lines1;
  return packed_bytes(plan, plan.strip) <= most_ring_bytes(plan);
}

/// Whether lines of columns stay for the next plane of rows.
bool keeps_lines(const RowGrid& grid, std::int64_t ring0) {
  return grid.most_rows(0) > 1 && ring0 > 1;
}

/// Widens the ring to all lines that a sweep sees, if these fit: they are there then for the next
/// row of axis 0, which sees most of them too. Circular axes are held whole, if they fit. Returns
/// the longest sweep.
std::int64_t keep_planes(Plan& plan) {
  const RowGrid& grid = plan.grid;
  const std::int64_t lines = grid.most_rows(1);
  const std::int64_t lines0 = plan.ring0, lines1 = plan.ring1;
  const bool has_next_row = keeps_lines(grid, lines0);
  // Asked first, as calls are small and columns take long to count.
  if (plan.in_pieces || !(has_next_row || grid.is_circular(1))) return lines;
  const auto goes_around = [&](int axis) {
    return grid.is_circular(axis) &&
           grid.turn(axis) < grid.most_columns(axis, grid.most_rows(axis));
  };
  const bool goes_around0 = goes_around(0);
  const auto fits = [&](std::int64_t sweep) {
    const std::int64_t seen = std::min(grid.turn(1), grid.most_columns(1, sweep));
    return (goes_around0 && fits_ring(plan, grid.turn(0), seen)) || fits_ring(plan, lines0, seen);
  };
  if (has_next_row)
    // The shorter sweeps are, the more lines are packed for two of them.
    for (std::int64_t sweep = lines; 2 * sweep > lines1; sweep = round_up(sweep / 2, plan.stack)) {
      if (fits(sweep)) return sweep;
      if (sweep == plan.stack) break;
    }
  else if (goes_around(1) && fits(lines))
    return lines;
  fits_ring(plan, lines0, lines1);
  return lines;
}

/// What a sweep packs before its first lines of rows, by what each stack of these takes: its own
/// columns, and products.
double cost_of_sweep(const Plan& plan, std::int64_t lines_at_hand) {
  const Problem& p = plan.problem();
  // Of planes that are kept only one is new.
  const std::int64_t planes = plan.ring1 > lines_at_hand ? 1 : plan.ring0;
  const double line =
      kPackedByte * static_cast<double>(plan.element_bytes) *
      static_cast<double>(column_elements(plan) * planes * plan.grid.most_columns(2, plan.strip));
  const double products = static_cast<double>(plan.stack * plan.strip * p.window_size()) *
                          static_cast<double>(p.head_dim + p.value_dim);
  return static_cast<double>(lines_at_hand - plan.stack) * line /
         (static_cast<double>(plan.stack) * line + products);
}

/// Makes items for all threads: by shorter sweeps as long as few lines are packed twice, then by
/// fewer heads, which reads memory in pieces. Then sweeps are chosen that share the work evenly.
void cut_into_items(Plan& plan, int threads) {
  const std::int64_t longest = plan.grid.most_rows(2), lines = plan.grid.most_rows(1);
  const std::int64_t lines_at_hand = plan.ring1;
  const std::int64_t longest_sweep = keep_planes(plan);
  plan.strips = (longest + plan.strip - 1) / plan.strip;
  plan.stacks = (lines + plan.stack - 1) / plan.stack;
  plan.slabs = plan.grid.most_rows(0);
  const auto set_sweeps = [&](std::int64_t count) {
    plan.sweeps = std::clamp<std::int64_t>(count, 1, std::max<std::int64_t>(plan.stacks, 1));
  };
  const auto too_few = [&] { return plan.all_items() < kItemsPerThread * threads; };
  const auto longest_of = [&](std::int64_t sweeps) { return (plan.stacks + sweeps - 1) / sweeps; };
  const std::int64_t least = (lines + longest_sweep - 1) / longest_sweep;
  set_sweeps(least);
  while (too_few() && longest_of(plan.sweeps) * plan.stack > 2 * lines_at_hand)
    set_sweeps(2 * plan.sweeps);
  while (too_few() && plan.row_heads > 1) set_fewer_heads(plan);
  if (threads <= 1 || plan.stacks <= 1) return;
  const std::int64_t others = plan.all_items() / plan.sweeps;
  // More are never needed.
  const std::int64_t most = std::min(
      plan.stacks,
      std::max(plan.sweeps, 4 * kItemsPerThread * threads / std::max<std::int64_t>(others, 1)));
  const double cost = cost_of_sweep(plan, lines_at_hand);
  std::int64_t best = plan.sweeps;
  double best_time = std::numeric_limits<double>::infinity();
  for (std::int64_t sweeps = least; sweeps <= most; ++sweeps) {
    const std::int64_t rounds = (others * sweeps + threads - 1) / threads,
                       stacks = longest_of(sweeps);
    const double time =
        (static_cast<double>(rounds) + kLateStart) * (static_cast<double>(stacks) + cost);
    if (time >= best_time) continue;
    best = sweeps;
    best_time = time;
  }
  set_sweeps(best);
}

/// Cuts the lines of rows into strips of `rows`, in whole vectors.
void set_strip(Plan& plan, std::int64_t rows) {
  const std::int64_t longest = plan.grid.most_rows(2);
  plan.strip = round_up(std::min(longest, rows), plan.width);
  plan.strips = (longest + plan.strip - 1) / plan.strip;
}
/// Cuts them into so many, or a few less.
void set_strips(Plan& plan, std::int64_t count) {
  set_strip(plan, (plan.grid.most_rows(2) + count - 1) / count);
}

/// Whether no token of an axis is visited more than twice.
bool meets_in_pairs(const Plan& plan, int axis) {
  const RowGrid& grid = plan.grid;
  const std::int64_t cuts = plan.cuts(axis);
  if (cuts == 1 && !grid.is_circular(axis)) return true;
  std::vector<char> visits;
  for (std::int64_t i = 0; i < grid.groups(axis); ++i) {
    const std::int64_t group = grid.group(axis, i);
    visits.assign(static_cast<std::size_t>(group_length(plan.problem().axes[axis], group)), 0);
    for (std::int64_t n = 0; n < cuts; ++n) {
      Interval seen = plan.columns_of_cut(axis, group, n);
      if (plan.holds_turn(axis)) seen.end = std::min(seen.end, seen.begin + grid.turn(axis));
      for (std::int64_t c = seen.begin; c < seen.end; ++c)
        if (++visits[floor_mod(c, grid.turn(axis))] > 2) return false;
    }
  }
  return true;
}

/// A way to cut the rows of an axis, of a dilation group.
struct Cuts {
  std::int64_t count;
  double columns;          // that the cuts see, added up, and what each costs besides, in columns
  std::int64_t most;       // that one of them sees
  std::int64_t most_rows;  // that one of them has
  double largest;          // likewise, as a share of the rows
};

/// For a pass that sums columns: counts of cuts that leave equal parts, and no columns that are
/// visited more than twice. `plan` has as few strips as can be.
std::vector<Cuts> ways_to_cut(Plan plan, int axis) {
  const RowGrid& grid = plan.grid;
  const std::int64_t rows = grid.most_rows(axis), group = grid.group(axis, 0),
                     least_strips = plan.strips;
  std::vector<Cuts> ways;
  for (const std::int64_t n : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    Cuts way{n, 0, 0, 0, 0};
    if (axis == 2) {
      // Of at least so many rows that vectors are full.
      way.count = n * least_strips;
      set_strips(plan, way.count);
      if (n > 1 && (plan.strip < kShortestStrip || plan.strips != way.count)) break;
    } else {
      if (n > (axis == 0 ? rows : plan.stacks)) break;
      (axis == 0 ? plan.slabs : plan.sweeps) = n;
    }
    if (!meets_in_pairs(plan, axis)) continue;
    for (std::int64_t i = 0; i < way.count; ++i) {
      const std::int64_t columns = plan.columns_of_cut(axis, group, i).size();
      way.columns += static_cast<double>(columns) + (axis == 2 ? kColumnsOfLine : 0);
      way.most = std::max(way.most, columns);
      way.most_rows = std::max(way.most_rows, plan.rows_of_cut(axis, {0, rows}, i).size());
    }
    way.largest = static_cast<double>(way.most_rows) / static_cast<double>(rows);
    // Planes that two slabs see are often packed by one thread, and once.
    if (axis == 0 && !ways.empty()) way.columns = (way.columns + ways[0].columns) / 2;
    ways.push_back(way);
  }
  return ways;
}

bool fits(const RingLimit& limit, const Plan& plan) {
  return packed_bytes(plan, plan.strip) <= limit.most * plan.element_bytes;
}

/// Chooses slabs, sweeps and strips of a pass that sums columns: those with which the time, of all
/// numbers of threads alike, is least. Tells whether there are any that fit, and are better than
/// two passes.
bool choose_cuts(Plan& plan, const RingLimit& limit, bool is_shared) {
  const Problem& p = plan.problem();
  std::vector<Cuts> ways[kMaxRank];
  for (int axis = 0; axis < kMaxRank; ++axis) {
    ways[axis] = ways_to_cut(plan, axis);
    if (ways[axis].empty()) return false;
  }
  const double groups = static_cast<double>(p.batch * p.kv_heads * plan.groups());
  const double column = kPackedByte * static_cast<double>(plan.element_bytes) *
                        static_cast<double>(column_elements(plan)) * groups / multiply_adds(p);
  const auto work = [&](const Cuts& a, const Cuts& b, const Cuts& c) {
    return 1 + column * a.columns * b.columns * c.columns;
  };
  const double most_threads =
      std::clamp(static_cast<double>(p.batch * p.heads * p.queries()) / kRowsPerThread, 1.0,
                 kMostThreadsOfColumnSums);
  // The times of 1, 2, 4 .. threads, multiplied. Two passes share their work evenly.
  double best = std::numeric_limits<double>::infinity();
  if (is_shared) {
    best = 1;
    for (double threads = 1; threads <= most_threads; threads *= 2)
      best *= limit.two_passes * work(ways[0][0], ways[1][0], ways[2][0]) / threads;
  }
  Coordinate cuts{};
  for (const Cuts& a : ways[0])
    for (const Cuts& b : ways[1])
      for (const Cuts& c : ways[2]) {
        const std::int64_t ring1 = keeps_lines(plan.grid, plan.ring0) ? b.most : plan.ring1;
        const std::int64_t elements =
            column_elements(plan) *
            (plan.ring0 * ring1 * c.most +
             plan.row_heads * plan.stack * round_up(c.most_rows, plan.width));
        if (elements <= limit.above || elements > limit.most) continue;
        const double parts = groups / (a.largest * b.largest * c.largest);
        double time = 1;
        for (double threads = 1; threads <= most_threads; threads *= 2)
          time *= work(a, b, c) * std::ceil(parts / threads - 1e-6) / parts;
        if (time >= best) continue;
        best = time;
        cuts = {a.count, b.count, c.count};
      }
  if (cuts[0] == 0) return false;
  plan.slabs = cuts[0];
  plan.sweeps = cuts[1];
  set_strips(plan, cuts[2]);
  return true;
}

/// Gathers items into units, where these have partial sums: so many that there are enough for any
/// machine. `others`: how many heads, or groups of heads, of all batch entries have such units.
void cut_into_units(Plan& plan, std::int64_t others) {
  plan.units = plan.items();
  const Problem& p = plan.problem();
  if (plan.kind() != PassKind::backward_query) return;
  const std::int64_t wanted =
      std::min(plan.units,
               std::max<std::int64_t>(1, kUnitsOfPartialSums / std::max<std::int64_t>(1, others)));
  const std::int64_t most_elements =
      static_cast<std::int64_t>(kMostPartialBytes / plan.element_bytes) /
      std::max<std::int64_t>(1, p.batch * p.heads);
  PartialSums& partial = plan.partial;
  if (p.wants_grad_rpb) partial.bias = bias_elements(p);
  if (p.wants_grad_additional)
    partial.additional = p.additional * (plan.padded + plan.value_padded);
  if (wanted * partial.additional + partial.bias > most_elements) partial.additional = 0;
  if (partial.elements() > 0)
    plan.units = std::max<std::int64_t>(1, std::min(wanted, most_elements / partial.elements()));
}

/// Plans one pass for the gradients of queries, keys and values: `plan` then has sums of columns.
/// Tells whether there is such a plan. How it cuts rows shows in these sums, so that depends on the
/// problem alone; only heads depend on threads.
bool plan_sums_of_columns(Plan& plan, const RingLimit& limit, int threads,
                          const Configuration& asked) {
  const Problem& p = plan.problem();
  if (p.batch == 0) return false;
  Plan found = plan;
  const RowGrid& grid = plan.grid;
  found.sums_columns = true;
  found.column = column_shape(found);
  // All heads that share one of keys add to its sums in turn.
  const std::int64_t group = p.heads / p.kv_heads;
  set_heads(found, group);
  found.stacks = (grid.most_rows(1) + plan.stack - 1) / plan.stack;
  found.slabs = found.sweeps = 1;
  set_strips(found, (grid.most_rows(2) + kLongestStrip - 1) / kLongestStrip);
  const bool is_shared = multiply_adds(p) >= kLeastSharedWork;  // by threads
  if ((is_shared || !fits(limit, found)) && !choose_cuts(found, limit, is_shared)) return false;
  if (asked.strip > 0) set_strip(found, asked.strip);
  const bool keeps = keeps_lines(grid, plan.ring0);
  if (keeps || (grid.is_circular(1) && found.sweeps == 1)) {
    for (std::int64_t i = 0; i < grid.groups(1); ++i)
      for (std::int64_t n = 0; n < found.sweeps; ++n)
        found.ring1 = std::max(found.ring1, found.columns_of_cut(1, grid.group(1, i), n).size());
    // A circular axis is held whole, unless lines that are at hand together go all around.
    if (plan.ring1 <= grid.turn(1)) found.ring1 = std::min(found.ring1, grid.turn(1));
    if (!keeps && !fits(limit, found)) found.ring1 = plan.ring1;
  }
  if (!fits(limit, found)) return false;
  for (int axis = 0; axis < kMaxRank; ++axis)
    if (!meets_in_pairs(found, axis)) return false;
  // Which heads go together depends on threads, partial sums do not.
  cut_into_units(found, p.batch * p.heads);
  if (group == 1) {
    found.row_heads = found.column_heads =
        std::min<std::int64_t>(grid.heads(), asked.heads > 0 ? asked.heads : simd::kMostHeads);
    const auto too_few = [&] {
      return is_shared && found.total_units() < 4 * kItemsPerThread * threads;
    };
    while (found.row_heads > 1 && (packed_bytes(found, found.strip) > kMostBytes || too_few()))
      set_heads(found, found.row_heads - 1);
  }
  cut_ring(found);
  if (limit.above == 0) found.piece_lines = found.lines;
  plan = found;
  return true;
}

/// Whether each row is in a block with the same rows, whatever strips they are cut into.
bool have_same_blocks(const Plan& a, const Plan& b) {
  const auto cut_by_blocks = [](const Plan& plan) {
    return plan.strips == 1 || plan.strip % plan.block_rows() == 0;
  };
  return a.width == b.width && a.stack == b.stack &&
         (a.strip == b.strip || (cut_by_blocks(a) && cut_by_blocks(b)));
}

/// Of a block's walk over a line of columns, with its padding, at most.
std::int64_t most_steps(const Plan& plan) {
  const std::int64_t rows = plan.block_rows();
  // Rows may begin a step apart where their windows do not.
  return plan.grid.most_columns(2, rows) + rows + kPaddingOfLine;
}

/// Whether a block's walk over columns is summed in one go, so that its extent shows nowhere.
bool is_one_batch(const Plan& plan) {
  return plan.lines * most_steps(plan) <= simd::kBatchSteps &&
         plan.problem().additional + kPaddingOfLine <= simd::kBatchSteps;
}

/// Plan::kept, of all steps or as many as fit the memory.
KeptBatches batches_to_keep(const Plan& plan) {
  KeptBatches kept;
  // With additional tokens blocks come back once those have been seen, which is rare.
  if (plan.kind() != PassKind::backward_query || plan.problem().additional > 0) return kept;
  const std::int64_t steps =
      std::min(most_steps(plan), plan.piece_columns + plan.block_rows() + kPaddingOfLine);
  if (!plan.has_pieces() && plan.lines * steps <= simd::kMostStepsAtOnce) return kept;
  const auto parts = [](std::int64_t count, std::int64_t of) { return (count + of - 1) / of; };
  const std::int64_t of_line = std::min<std::int64_t>(steps, simd::kBatchSteps);
  kept.of_piece = parts(plan.piece_lines, simd::kBatchSteps / of_line) *
                  parts(steps - kPaddingOfLine, of_line - kPaddingOfLine);
  kept.piece_steps = plan.piece_lines * of_line;
  if (kept.of_piece == 1) kept.pieces = simd::kBatchSteps / kept.piece_steps;
  const std::int64_t pieces = parts(plan.lines, plan.piece_lines) *
                              parts(plan.grid.most_columns(2, plan.strip), plan.piece_columns);
  kept.of_block = parts(pieces, kept.pieces) * kept.of_piece;
  const std::int64_t blocks =
      plan.has_pieces() ? plan.row_heads * parts(plan.strip, plan.block_rows()) : 1;
  const auto bytes = static_cast<std::int64_t>(plan.element_bytes) * simd::kMostStepsAtOnce *
                     kMostVectors * plan.width;
  kept.count = std::min(blocks * kept.of_block, kMostKeptBytes / bytes);
  return kept;
}

}  // namespace

double multiply_adds(const Problem& p) {
  const double pairs =
      static_cast<double>(p.batch * p.heads * p.queries()) * static_cast<double>(p.slots());
  const auto dims = static_cast<double>(std::max<std::int64_t>(p.head_dim + p.value_dim, 1));
  return (p.op == Op::attention_backward ? 2.5 : 1.0) * pairs * dims;
}

Interval Plan::columns_of_cut(int axis, std::int64_t group, std::int64_t number) const {
  const Interval rows = grid.rows(axis, group);
  const Interval cut = rows_of_cut(axis, rows, number);
  if (number < 0 || number >= cuts(axis) || cut.size() <= 0) return {0, 0};
  return {grid.columns(axis, group, cut.begin).begin, grid.columns(axis, group, cut.end - 1).end};
}

bool sums_alike(const Plan& a, const Plan& b) {
  if (a.sums_columns != b.sums_columns) return false;
  if (a.sums_columns &&
      (a.stack != b.stack || a.strip != b.strip || a.sweeps != b.sweeps || a.slabs != b.slabs))
    return false;
  if (a.has_pieces() || b.has_pieces() || a.partial.elements() > 0 || b.partial.elements() > 0)
    return false;
  return have_same_blocks(a, b) || (is_one_batch(a) && is_one_batch(b));
}

PassKind first_pass(Op op) {
  return op == Op::qk             ? PassKind::qk
         : op == Op::av           ? PassKind::av
         : op == Op::av_transpose ? PassKind::av_transpose
                                  : PassKind::forward;
}

Plan make_plan(const Problem& problem, PassKind kind, int vector_width, std::size_t element_bytes,
               bool in_pairs, int threads, const Configuration& asked) {
  Plan plan;
  plan.grid.problem = problem;
  plan.grid.kind = kind;
  plan.width = vector_width;
  plan.element_bytes = element_bytes;
  plan.in_pairs = in_pairs;
  plan.padded = round_up(problem.head_dim, plan.width);
  plan.value_padded = round_up(problem.value_dim, plan.width);
  plan.column = column_shape(plan);
  // Where neighboring lines of rows see no lines in common, stacking them gives nothing.
  const RowGrid& grid = plan.grid;
  plan.stack =
      grid.most_rows(1) > 1 && grid.most_columns(1, 1) > 1
          ? (asked.stack > 0 ? std::min<std::int64_t>(asked.stack, kMostVectors) : kMostVectors)
          : 1;
  plan.ring0 = std::max<std::int64_t>(1, grid.most_columns(0, 1));
  plan.ring1 = std::max<std::int64_t>(1, grid.most_columns(1, plan.stack));
  plan.ring2 = std::max<std::int64_t>(1, grid.most_columns(2, 1));
  plan.lines = plan.ring0 * plan.ring1;
  const auto sums_columns = [&](const RingLimit& limit) {
    return plan_sums_of_columns(plan, limit, threads, asked);
  };
  if (kind != PassKind::backward_query || !(sums_columns(kRing) || sums_columns(kRingInPieces))) {
    const bool sums_up = kind == PassKind::backward_query &&
                         (problem.wants_grad_rpb || problem.wants_grad_additional);
    fit_cache(plan, asked);
    cut_into_items(plan, sums_up ? kThreadsOfPartialSums : threads);
    cut_into_units(plan, problem.batch * plan.head_groups());
  }
  plan.line_rows = round_up(plan.strip, plan.width);
  plan.head_rows = plan.stack * plan.line_rows;
  plan.kept = batches_to_keep(plan);
  return plan;
}

}  // namespace natten::detail::cpu::engine
