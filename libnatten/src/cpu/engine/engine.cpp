#include "engine.h"

// Along the innermost axis what a row sees is contiguous (within its dilation group), so the
// columns of one line serve all rows of a strip, and most of the lines that one line of rows sees
// serve its neighbors too. Lines are packed once, converted to the type of sums and transposed,
// into a ring that slides along the middle axis with the rows, and along the first one where it has
// room for what a sweep sees. The kernels (simd/) work on blocks of a few vectors of rows: at the
// same place of neighboring lines, or one after the other on a line.

namespace natten::detail::cpu::engine {

using simd::kMostVectors;

template <class E>
Engine<E>::Engine(Pass<E>& pass, const AdditionalTokens<E>& additional, const BiasTables<E>& biases)
    : pass_(pass),
      plan_(pass.plan),
      p_(plan_.problem()),
      loader_(pass.isa, p_.dtype, plan_.in_pairs),
      additional_(additional),
      biases_(biases) {}

template <class E>
void Engine<E>::take_memory(std::vector<char>& memory) {
  Arena arena(memory);
  for (int round = 0; round < 2; ++round) {
    packed_.take(arena, plan_);
    additional_.take(arena, plan_);
    biases_.take(arena, plan_);
    pass_.take_memory(arena);
    scratch_ = arena.take<T>(
        static_cast<std::int64_t>(kernels_for<T>(pass_.isa, plan_.in_pairs).scratch_elements));
    if (round == 0) arena.begin();
  }
  lines_.resize(plan_.piece_lines);
}

template <class E>
void Engine<E>::run(std::int64_t first, std::int64_t last) {
  ThreadMemory memory;
  take_memory(memory.bytes());
  Coordinate columns_of{-1, -1, -1};  // which items the packed columns serve
  for (std::int64_t unit = first; unit < last; ++unit) {
    Work work;
    work.unit = unit % plan_.units;
    const std::int64_t head_group = unit / plan_.units % plan_.head_groups();
    work.batch = unit / plan_.units / plan_.head_groups();
    work.first_head = head_group * plan_.row_heads;
    work.head_count = std::min(plan_.row_heads, plan_.grid.heads() - work.first_head);
    pass_.begin_unit(work);
    const std::int64_t items = plan_.items();
    for (std::int64_t item = items * work.unit / plan_.units;
         item < items * (work.unit + 1) / plan_.units; ++item) {
      // Items of a strip and dilation group see columns in common.
      const std::int64_t of = unit / plan_.units, cut = item / plan_.slabs;
      const Coordinate serves{of, cut / plan_.strips / plan_.sweeps, cut % plan_.strips};
      if (serves != columns_of) packed_.forget();
      columns_of = serves;
      run_item(work, item);
    }
  }
}

template <class E>
void Engine<E>::run_item(Work work, std::int64_t item) {
  const RowGrid& grid = plan_.grid;
  work.slab = item % plan_.slabs;
  item /= plan_.slabs;
  work.strip = item % plan_.strips;
  item /= plan_.strips;
  work.sweep = item % plan_.sweeps;
  item /= plan_.sweeps;
  const Coordinate group = unravel(item, {grid.groups(0), grid.groups(1), grid.groups(2)});
  Interval rows[kMaxRank];
  for (int axis = 0; axis < kMaxRank; ++axis) {
    work.group[axis] = grid.group(axis, group[axis]);
    rows[axis] = grid.rows(axis, work.group[axis]);
  }
  const Interval strip = plan_.rows_of_cut(2, rows[2], work.strip);
  work.first[2] = strip.begin;
  // Items are counted for the longest group: those of others may be without rows.
  work.row_count = strip.size();
  if (work.row_count <= 0) return;
  seen_by_row_.resize(work.row_count);
  first_slot_by_row_.assign(work.row_count, 0);
  const bool has_empty_slots =
      p_.axes[2].boundary == Boundary::cut && rows_have_slots(plan_.kind());
  for (std::int64_t r = 0; r < work.row_count; ++r) {
    const std::int64_t position = work.first[2] + r;
    seen_by_row_[r] = grid.columns(2, work.group[2], position);
    if (has_empty_slots)
      first_slot_by_row_[r] =
          seen_by_row_[r].begin - first_slot(p_.axes[2], work.group[2], position);
  }
  const Interval planes = plan_.rows_of_cut(0, rows[0], work.slab);
  const Interval lines = plan_.rows_of_cut(1, rows[1], work.sweep);
  for (work.first[0] = planes.begin; work.first[0] < planes.end; ++work.first[0])
    for (work.first[1] = lines.begin; work.first[1] < lines.end; work.first[1] += plan_.stack) {
      work.line_count = std::min(plan_.stack, lines.end - work.first[1]);
      run_rows(work);
    }
  packed_.take_all_sums([&](const LineSums<T>& sums) { pass_.store_columns(work, sums); });
}

template <class E>
void Engine<E>::run_rows(Work work) {
  pass_.load_rows(work, loader_);
  const std::int64_t group = p_.heads / p_.kv_heads;  // heads that share one of keys
  const bool keys = rows_are_keys(plan_.kind());
  work.column_head_count = plan_.column_heads == 1 ? 1 : work.head_count;
  // Where rows are keys, all query heads that share one give it gradients.
  for (std::int64_t i = 0; i < (keys ? group : 1); ++i) {
    work.column_head = keys ? work.first_head * group + i : work.first_head / group;
    work.query_head = keys ? work.column_head : work.first_head;
    if (keys && group > 1) packed_.forget();  // the ring holds one head's lines
    for (work.round = 0; work.round < pass_.rounds(); ++work.round) {
      visit_windows(work);
      for (std::int64_t first = 0; first < p_.additional && !keys; first += kAdditionalPiece)
        visit_additional(work, first);
      pass_.end_round(work);
    }
  }
  loader_.forget();  // rows that saw nothing
  pass_.store_rows(work);
}

template <class E>
void Engine<E>::visit_windows(Work work) {
  if (biases_) biases_.load(work);
  const LinesSeen seen(plan_, work);
  const std::int64_t end = seen_by_row_.back().end;
  work.piece = 0;
  for (std::int64_t c = seen_by_row_.front().begin; c < end; c += plan_.piece_columns) {
    const Interval part{c, std::min(end, c + plan_.piece_columns)};
    for (std::int64_t l = 0; l < seen.count(); l += plan_.piece_lines) {
      const std::int64_t count = std::min(seen.count() - l, plan_.piece_lines);
      for (work.head = 0; work.head < work.head_count; ++work.head) {
        for (std::int64_t i = 0; i < count; ++i) {
          const auto position = [&]() -> Coordinate {
            const Coordinate at = seen.line(l + i);
            return {at[0], at[1], part.begin};
          };
          if (work.head == 0)
            lines_[i] = line_of(work, seen, i, position(), part.size());
          else if (plan_.column_heads > 1)
            packed_.to_next_head(lines_[i]);
          if (biases_) biases_.set(lines_[i], plan_, work, position(), pass_.grad_bias(work));
        }
        visit_blocks(work, {lines_.data(), count, part, &seen});
      }
      ++work.piece;
    }
  }
}

template <class E>
simd::Line<StatisticOf<E>> Engine<E>::line_of(const Work& work, const LinesSeen& seen,
                                              std::int64_t number, const Coordinate& position,
                                              std::int64_t count) {
  const std::int64_t entry = packed_.entry_of(plan_, number, position);
  if (packed_.admit(plan_, number, position)) {
    packed_.take_sums(entry, [&](const LineSums<T>& sums) { pass_.store_columns(work, sums); });
    pass_.pack_line(work, packed_.to_pack(entry, position, count), loader_);
  }
  if (plan_.sums_columns) packed_.begin_sums(plan_, entry, position, count);
  simd::Line<T> line = packed_.line(entry);
  if (plan_.stack > 1) {
    while (line.first_vector < work.line_count && seen.axis1[line.first_vector].end <= position[1])
      ++line.first_vector;
    line.last_vector = line.first_vector;
    while (line.last_vector < work.line_count && seen.axis1[line.last_vector].begin <= position[1])
      ++line.last_vector;
  }
  pass_.locate_weights(line, number, position, seen);
  return line;
}

template <class E>
void Engine<E>::visit_additional(Work work, std::int64_t first) {
  additional_.load(pass_.isa, plan_, work, first);
  for (work.head = 0; work.head < work.head_count; ++work.head) {
    simd::Line<T> line = additional_.line(plan_, plan_.column_heads == 1 ? 0 : work.head);
    pass_.locate_sums(line, work, first);
    visit_blocks(work, {&line, 1, {first, first + additional_.count()}, nullptr});
  }
}

template <class E>
void Engine<E>::visit_blocks(Work work, const Columns<T>& columns) {
  loader_.run();
  const auto [start, stop] = columns.part;
  simd::Block<T> block;
  block.adjacent = plan_.stack == 1;
  block.everywhere = columns.are_additional();
  block.vector_stride = block.adjacent ? plan_.width : plan_.line_rows;
  block.lines = columns.lines;
  block.line_count = columns.line_count;
  block.ld = packed_.ld();
  block.bias_stride = biases_.stride();
  block.dim = plan_.elements(p_.head_dim);
  block.value_dim = plan_.elements(p_.value_dim);
  block.padded = plan_.padded;
  block.value_padded = plan_.value_padded;
  block.scale = static_cast<T>(plan_.score_scale());
  block.scratch = scratch_;
  const std::int64_t most_rows = (block.adjacent ? kMostVectors : 1) * plan_.width;
  for (work.row = 0; work.row < work.row_count; work.row += most_rows) {
    block.rows = static_cast<int>(std::min(most_rows, work.row_count - work.row));
    block.vectors = static_cast<int>(block.adjacent ? (block.rows + plan_.width - 1) / plan_.width
                                                    : work.line_count);
    block.position = work.first[2] + work.row - start;
    bool sees_any = block.everywhere;
    for (int i = 0; i < block.rows; ++i) {
      const Interval seen = block.everywhere ? columns.part : seen_by_row_[work.row + i];
      block.begin[i] = std::clamp(seen.begin, start, stop) - start;
      block.end[i] = std::clamp(seen.end, start, stop) - start;
      block.first_slot[i] = block.everywhere ? 0 : first_slot_by_row_[work.row + i];
      sees_any = sees_any || block.begin[i] < block.end[i];
    }
    if (!sees_any) continue;
    checkpoint(block.line_count * (block.end[block.rows - 1] - block.begin[0]) * block.vectors *
               plan_.width * (p_.head_dim + p_.value_dim));
    pass_.run_block(work, columns, block);
  }
}

template class Engine<double>;
template class Engine<float>;
template class Engine<bfloat16>;
template class Engine<float16>;

}  // namespace natten::detail::cpu::engine
