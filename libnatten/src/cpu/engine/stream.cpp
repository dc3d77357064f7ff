#include "stream.h"

#include <limits>
#include <vector>

#include "loader.h"

namespace natten::detail::cpu::engine {
namespace {

constexpr std::int64_t kFewRows = 8;
// Rows that are handled together, in all query heads that share a key head: more would displace
// what they read from the caches, fewer would read keys at their ends again and again.
constexpr std::int64_t kRowsAtHand = 16, kLeastRows = 4;

/// Heads and rows that are handled together, and how columns are cut. Both rows and columns are
/// neither stacked nor packed.
Plan plan_stream(const Problem& problem, int width, std::size_t element_bytes, int threads) {
  Plan plan;
  plan.grid = {problem, PassKind::forward};
  plan.width = width;
  plan.element_bytes = element_bytes;
  plan.padded = round_up(problem.head_dim, plan.width);
  plan.value_padded = round_up(problem.value_dim, plan.width);
  plan.stack = plan.stacks = plan.sweeps = plan.slabs = 1;
  const std::int64_t rows = plan.grid.most_rows(2), group = problem.heads / problem.kv_heads;
  plan.strip = std::min(rows, std::max(kRowsAtHand / group, kLeastRows));
  plan.strips = (rows + plan.strip - 1) / plan.strip;
  plan.units = plan.items();
  plan.line_rows = plan.head_rows = plan.strip;
  // Heads of a token are neighbors in memory.
  plan.column_heads = std::min<std::int64_t>(problem.kv_heads, simd::kMostHeads);
  const auto set_rows = [&] { plan.row_heads = plan.column_heads * group; };
  for (set_rows(); plan.total_units() < threads && plan.column_heads > 1; set_rows())
    plan.column_heads = (plan.column_heads + 1) / 2;
  plan.ring2 = std::max<std::int64_t>(1, plan.grid.most_columns(2, 1));
  plan.in_pieces = true;
  plan.piece_columns =
      std::min<std::int64_t>(plan.grid.most_columns(2, plan.strip), simd::kMostStreamColumns);
  plan.piece_lines = simd::kMostStreamColumns / std::min(plan.ring2, plan.piece_columns);
  return plan;
}

template <class E>
class Stream {
 public:
  using T = StatisticOf<E>;

  Stream(const Job& job, int threads)
      : isa_(instruction_set()),
        plan_(plan_stream(job.problem, kernels_for<T>(isa_).width, sizeof(T), threads)),
        mask_(key_mask(job.problem, job.tensors)),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)),
        key_(operand<const E>(job.problem, job.tensors, &Tensors::key)),
        value_(operand<const E>(job.problem, job.tensors, &Tensors::value)),
        biases_(operand<const E>(job.problem, job.tensors, &Tensors::rpb)),
        additional_keys_(operand<const E>(job.problem, job.tensors, &Tensors::additional_keys)),
        additional_values_(operand<const E>(job.problem, job.tensors, &Tensors::additional_values)),
        output_(operand<E>(job.problem, job.tensors, &Tensors::output)),
        logsumexp_(operand<T>(job.problem, job.tensors, &Tensors::logsumexp)) {}

  const Plan& plan() const { return plan_; }

  void run(std::int64_t first, std::int64_t last) {
    ThreadMemory memory;
    take_memory(memory.bytes());
    const simd::Kernels<T>& kernels = kernels_for<T>(isa_);
    const Problem& p = plan_.problem();
    for (std::int64_t unit = first; unit < last; ++unit) {
      const Work work = work_of(unit);
      if (work.row_count <= 0) continue;
      Loader<T> loader(isa_, p.dtype);
      pack_rows(loader, plan_, work, Source<E>{query_, p.head_dim, p.scale}, {}, query_rows_);
      loader.run();
      sums_.fill(plan_, work, T(0));
      largest_.fill(plan_, work, -std::numeric_limits<T>::infinity());
      total_.fill(plan_, work, T(0));
      for_each_piece(work, kernels.stream[static_cast<int>(p.dtype)]);
      // `largest` becomes logsumexp, and `total` the factor of sums.
      kernels.finish(largest_.data, total_.data, work.head_count * plan_.head_rows);
      unpack_rows(isa_, plan_, work, sums_, Target<E, T>{output_, p.value_dim, 1.0, total_});
      if (logsumexp_)
        for_each_row(plan_, work, [&](std::int64_t r, std::int64_t head, const Coordinate& token) {
          *logsumexp_.at(work.batch, head, token) = largest_[r];
        });
    }
  }

  /// The rows of a unit; none where its group is shorter than others.
  Work work_of(std::int64_t unit) const {
    const RowGrid& grid = plan_.grid;
    Work work;
    work.unit = unit % plan_.units;
    const std::int64_t head_group = unit / plan_.units % plan_.head_groups();
    work.batch = unit / plan_.units / plan_.head_groups();
    work.first_head = head_group * plan_.row_heads;
    work.head_count = std::min(plan_.row_heads, grid.heads() - work.first_head);
    const std::int64_t share = plan_.row_heads / plan_.column_heads;
    work.column_head = work.first_head / share;
    work.column_head_count = work.head_count / share;
    const Coordinate group =
        unravel(work.unit / plan_.strips, {grid.groups(0), grid.groups(1), grid.groups(2)});
    for (int axis = 0; axis < kMaxRank; ++axis) {
      work.group[axis] = grid.group(axis, group[axis]);
      work.first[axis] = grid.rows(axis, work.group[axis]).begin;
    }
    work.first[2] += work.unit % plan_.strips * plan_.strip;
    work.line_count = 1;
    work.row_count = std::min(plan_.strip, grid.rows(2, work.group[2]).end - work.first[2]);
    return work;
  }

  /// Calls `f(rows and as many columns as they are run over at a time)` for all that the rows see.
  template <class F>
  void for_each_piece(const Work& work, F&& f) {
    const Problem& p = plan_.problem();
    simd::Stream<T> s;
    s.key_head = key_.head;
    s.value_head = value_.head;
    s.bias_head = biases_.head;
    s.heads = static_cast<int>(work.column_head_count);
    s.group = static_cast<int>(work.head_count / work.column_head_count);
    s.rows = static_cast<int>(work.row_count);
    s.position = work.first[2];
    s.dim = p.head_dim;
    s.value_dim = p.value_dim;
    s.padded = plan_.padded;
    s.value_padded = plan_.value_padded;
    s.head_rows = plan_.head_rows;
    s.query = query_rows_.data;
    s.sums = sums_.data;
    s.largest = largest_.data;
    s.total = total_.data;
    s.added = added_.data;
    s.scores = scores_.data;
    s.key_stride = key_.grid[2] * p.axes[2].dilation;
    s.value_stride = value_.grid[2] * p.axes[2].dilation;
    std::int64_t begin[simd::kMostStreamRows], end[simd::kMostStreamRows];
    s.begin = begin;
    s.end = end;
    const auto call = [&](std::int64_t columns) {
      if (lines_.empty()) return;
      checkpoint(columns * work.row_count * work.head_count * (p.head_dim + p.value_dim));
      s.lines = lines_.data();
      s.line_count = static_cast<std::int64_t>(lines_.size());
      f(s);
      lines_.clear();
    };

    for (std::int64_t r = 0; r < work.row_count; ++r) {
      const Interval seen = plan_.grid.columns(2, work.group[2], work.first[2] + r);
      begin[r] = seen.begin;
      end[r] = seen.end;
    }
    const std::int64_t last = end[work.row_count - 1];
    const LinesSeen seen(plan_, work);
    for (std::int64_t c = begin[0]; c < last; c += plan_.piece_columns) {
      const std::int64_t columns = std::min(last - c, plan_.piece_columns);
      for (std::int64_t l = 0; l < seen.count(); l += plan_.piece_lines) {
        const std::int64_t lines = std::min(seen.count() - l, plan_.piece_lines);
        for (std::int64_t i = 0; i < lines; ++i) {
          Coordinate position = seen.line(l + i);
          position[2] = c;
          add_line(work, position, columns);
        }
        call(lines * columns);
      }
    }

    s.key_stride = additional_keys_.token;
    s.value_stride = additional_values_.token;
    s.key_head = additional_keys_.head;
    s.value_head = additional_values_.head;
    for (std::int64_t n = 0; n < p.additional; n += simd::kMostStreamColumns) {
      const std::int64_t columns =
          std::min<std::int64_t>(p.additional - n, simd::kMostStreamColumns);
      std::fill_n(begin, work.row_count, 0);
      std::fill_n(end, work.row_count, columns);
      lines_.push_back({additional_keys_.at(work.batch, work.column_head, n),
                        additional_values_.at(work.batch, work.column_head, n), 0, columns,
                        nullptr});
      call(columns);
    }
  }

 private:
  /// Adds the columns of a line from `first` on that are given and not hidden.
  void add_line(const Work& work, const Coordinate& first, std::int64_t count) {
    const Problem& p = plan_.problem();
    const std::int64_t dilation = p.axes[2].dilation;
    const E* bias = nullptr;
    if (biases_) {
      Coordinate at{0, 0, p.axes[2].kernel_size - 1};
      for (int i = 0; i < 2; ++i) at[i] = first[i] - work.first[i] + p.axes[i].kernel_size - 1;
      bias = biases_.at(0, work.first_head, at);
    }
    const auto add = [&](const Coordinate& key, std::int64_t at, std::int64_t columns) {
      const std::int64_t column = first[2] + at;
      lines_.push_back({key_.at(work.batch, work.column_head, key),
                        value_.at(work.batch, work.column_head, key), column, column + columns,
                        bias});
    };
    for_each_run(plan_, work, first, count,
                 [&](const Coordinate* run, std::int64_t at, std::int64_t columns) {
                   if (!run) return;
                   if (!mask_) return add(*run, at, columns);
                   Coordinate key = *run;
                   std::int64_t shown = 0;  // up to here
                   for (std::int64_t i = 0; i <= columns; ++i) {
                     if (i < columns && !mask_.hides(work.batch, key)) {
                       ++shown;
                     } else if (shown > 0) {
                       Coordinate begin = key;
                       begin[2] -= shown * dilation;
                       add(begin, at + i - shown, shown);
                       shown = 0;
                     }
                     key[2] += dilation;
                   }
                 });
  }

  void take_memory(std::vector<char>& memory) {
    Arena arena(memory);
    for (int round = 0; round < 2; ++round) {
      query_rows_ = take_rows<T>(arena, plan_, plan_.padded);
      sums_ = take_rows<T>(arena, plan_, plan_.value_padded);
      added_ = take_rows<T>(arena, plan_, plan_.value_padded);
      largest_ = take_rows<T>(arena, plan_, 1);
      total_ = take_rows<T>(arena, plan_, 1);
      scores_ = take_rows<T>(arena, plan_, simd::kMostStreamColumns + simd::kMostWidth);
      if (round == 0) arena.begin();
    }
  }

  const simd::InstructionSet& isa_;
  Plan plan_;
  KeyMask mask_;
  Operand<const E> query_, key_, value_, biases_, additional_keys_, additional_values_;
  Operand<E> output_;
  Operand<T> logsumexp_;
  RowBuffer<T> query_rows_, sums_, added_, largest_, total_, scores_;
  std::vector<simd::StreamLine> lines_;  // at hand
};

/// Columns of a piece that its rows see, each row's counted.
template <class T>
std::int64_t pairs_of(const simd::Stream<T>& s) {
  std::int64_t pairs = 0;
  for (std::int64_t l = 0; l < s.line_count; ++l)
    for (int r = 0; r < s.rows; ++r)
      pairs += std::max<std::int64_t>(
          0, std::min(s.end[r], s.lines[l].last) - std::max(s.begin[r], s.lines[l].first));
  return pairs * s.heads * s.group;
}

}  // namespace

bool is_stream(const Problem& p) {
  const RowGrid grid{p, PassKind::forward};
  const auto is_long = [](std::int64_t lines, std::int64_t columns) {
    const std::int64_t padding = (lines - 1) * 2 * simd::kPaddingSteps;  // between lines
    return lines * columns + padding > simd::kBatchSteps;
  };
  // Asked first, as calls are small and columns take long to count.
  if (grid.most_rows(0) > 1 || grid.most_rows(1) > 1 ||
      std::min(grid.most_rows(2), p.axes[2].kernel_size) > kFewRows ||
      !is_long(p.axes[0].kernel_size * p.axes[1].kernel_size, p.axes[2].kernel_size))
    return false;
  return is_long(grid.most_columns(0, 1) * grid.most_columns(1, 1), grid.most_columns(2, 1));
}

template <class E>
Phase stream(const Job& job, int threads) {
  const Stream<E> pass(job, threads);
  return {pass.plan().total_units(), [=](std::int64_t first, std::int64_t last) {
            Stream<E> own(pass);
            own.run(first, last);
          }};
}
template Phase stream<double>(const Job&, int);
template Phase stream<float>(const Job&, int);
template Phase stream<bfloat16>(const Job&, int);
template Phase stream<float16>(const Job&, int);

PassWork count_stream(const Problem& p, int threads) {
  PassWork result;
  dispatch_dtype(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = StatisticOf<E>;
    Stream<E> pass({p, {}, nullptr}, threads);
    result.units = pass.plan().total_units();
    const auto bytes = [](std::int64_t elements) {
      return static_cast<double>(elements) * sizeof(E);
    };
    const std::int64_t dims = p.head_dim + p.value_dim;
    for (std::int64_t unit = 0; unit < result.units; ++unit) {
      const Work work = pass.work_of(unit);
      if (work.row_count <= 0) continue;
      const std::int64_t rows = work.row_count * work.head_count;
      pass.for_each_piece(work, [&](const simd::Stream<T>& s) {
        const auto pairs = static_cast<double>(pairs_of(s));
        std::int64_t columns = 0;
        for (std::int64_t l = 0; l < s.line_count; ++l)
          columns += s.lines[l].last - s.lines[l].first;
        result.calls += 1;
        result.tiles += static_cast<double>(s.line_count);
        result.weights += pairs;
        result.executed += pairs * static_cast<double>(dims);
        result.read += bytes(columns * s.heads * dims);
      });
      result.read += bytes(rows * p.head_dim);
      result.packed += static_cast<double>(rows * p.head_dim) * sizeof(T);
      result.written +=
          bytes(rows * p.value_dim) + (p.has_logsumexp ? static_cast<double>(rows) * sizeof(T) : 0);
    }
  });
  return result;
}

}  // namespace natten::detail::cpu::engine
