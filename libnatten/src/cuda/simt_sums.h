#pragma once

#include <limits>
#include <type_traits>

#include "simt_rows.h"

namespace natten::detail::cuda::simt {

/// What a pair (row, column) weighs. A score is scale * <a of the row, a of the column> + bias.
enum class Weight {
  softmax,      ///< exp(score), normalised over the row
  probability,  ///< P = exp(score - logsumexp)
  grad_score,   ///< P * (<b of the row, b of the column> - row term)
  score,
  slot,       ///< attn of the pair
  grad_bias,  ///< as grad_score
};

/// Sums of weights by the offset of the column from the row, one array of them for each head and
/// each of some parts of the tiles. A warp has a part of the offsets too, `lines` of them along the
/// first axis that has several, so that no other one writes where it does.
template <class Sum>
struct OffsetSums {
  Sum* data;  // [splits, heads, offsets], 0 at first
  int offsets[kMaxRank];
  int axis, before;  // offsets along that axis below 0, and as many above it
  int lines, parts;
  int splits;  // of the tiles of all batches...
  int batches;

  NATTEN_HOST_DEVICE std::int64_t count() const {
    return std::int64_t{offsets[0]} * offsets[1] * offsets[2];
  }
  /// Elements of all arrays.
  std::int64_t size(std::int64_t heads) const { return splits * heads * count(); }
};

/// Arguments of RowSums. Operands that a pass does not use stay null.
template <class T>
struct Sums {
  using Sum = StatisticOf<T>;

  Tiles tiles;
  Sights sights;         // of the rows
  Sights column_sights;  // of queries, where rows are keys
  int kernel_size[kMaxRank];
  int window_size;  // slot of the first additional token
  int additional;   // columns after the window's
  int heads;        // of rows
  int group;        // query heads per key-value head
  int splits;       // parts of the columns, for few rows that see many
  int slices;       // parts of the elements of sums
  int score_dims, grad_dims, sum_dims;
  Sum scale;

  Operand<const T> row_a, row_b;
  ColumnOperand<const T> column_a, column_b, column_c;
  Operand<const T> bias;
  Operand<const std::uint8_t> row_mask;  // of keys...
  ColumnOperand<const std::uint8_t> column_mask;
  ColumnOperand<const T> attn;                   // of queries, be they rows or columns...
  ColumnOperand<const Sum> logsumexp, row_term;  // ...like these

  Operand<T> sums;
  Operand<Sum> partial;           // or of additional tokens, one part of the columns...
  std::int64_t partial_split;     // ...after another
  Operand<Sum> statistic;         // logsumexp of a softmax, else the row term: sum P dP / sum P...
  Operand<const Sum> subtracted;  // ...minus this, where given
  Operand<T> weights;             // scores by their slots
  bool fills_empty;               // slots without a key...
  Sum empty;                      // ...with this
  Examples examples;              // `tiles` are those of the longest
  OffsetSums<Sum> biases;         // weights by their offsets
};

/// Per row: sums over the columns that it sees of weight * (c of the column), a statistic of the
/// weights, or the weights themselves. With the tensors that simt.h chooses for a, b and c
/// this is every operation but the sums of bias gradients.
///
/// Rows are queries, and columns keys and then additional tokens; or, with `kKeyRows`, rows are
/// keys or additional tokens and columns the queries of all heads that share them. `kDims` elements
/// of the sums are kept in registers, and vectors are read `kVector` elements at a time; other
/// blocks sum up other slices of the elements.
/// With `kTf32`, vectors of scores and their gradients are rounded to TF32, as by backends that
/// multiply so.
template <class T, Weight kWeight, bool kKeyRows, int kDims, int kVector, bool kTf32 = false>
struct RowSums {
  using Sum = StatisticOf<T>;
  using Stored = std::conditional_t<kWeight == Weight::score, T, Sum>;
  static constexpr bool kHasScore = kWeight != Weight::slot;
  static constexpr bool kIsGrad = kWeight == Weight::grad_score || kWeight == Weight::grad_bias;
  static constexpr bool kSumsProbabilities = kWeight == Weight::grad_score && !kKeyRows;
  static constexpr bool kAddsBiases = kWeight == Weight::grad_bias;
  /// Whether a thread finds its row again to write it: kept until then it takes registers, of which
  /// sums leave too few.
  static constexpr bool kFindsAgain = kDims > 0 && kHasScore;
  static constexpr int kSumDims = kDims;
  static constexpr int kWarps = kAddsBiases ? 2 : 1;
  static constexpr int kThreads = kWarps * kRows;
  static constexpr int kBlocks = kAddsBiases ? 4 : kDims * sizeof(Sum) > 256 ? 8 : 12;

  Sums<T> in;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    if constexpr (kAddsBiases) {
      const auto block = static_cast<std::uint32_t>(gpu.block());
      add_biases(gpu, block * kWarps + static_cast<std::uint32_t>(gpu.thread()) / kRows);
    } else {
      const auto block = static_cast<int>(gpu.block());
      const Place at = place(block, gpu.thread());
      if (at.tile.is_empty) return;
      View view = in.tiles.template view<kKeyRows>(at.tile, at.row, at.span, in.sights);
      if constexpr (kKeyRows)
        if (in.row_mask && *in.row_mask.at(at.batch, 0, widened(at.row.token)) == 0)
          view.seen[2] = {0, 0};
      RowSum result;
      sum_row(gpu, at, view, nullptr, result);
      if constexpr (kFindsAgain)
        write(place(gpu.opaque(block), gpu.opaque(gpu.thread())), result);
      else
        write(at, result);
    }
  }

 private:
  /// What a warp is at work on, and a thread's row of it.
  struct Place {
    Tile tile;
    Row row;
    Span span;
    int slice, split;
    std::int64_t head, batch;
  };
  NATTEN_DEVICE Place place(int block, int thread) const {
    Place p;
    auto index = static_cast<std::uint32_t>(block);
    p.slice = take(index, in.slices);
    p.span = in.examples ? take_example(index) : in.tiles.whole();
    p.tile = in.tiles.tile(index, p.span);
    p.row = in.tiles.row(p.tile, thread, p.span);
    p.split = kKeyRows ? take(index, in.splits) : 0;
    p.head = widened(take(index, in.heads));
    p.batch = index;
    return p;
  }

  /// What a row sums up.
  struct RowSum {
    Sum sum[kDims > 0 ? kDims : 1] = {};
    Sum largest = kNone, total = 0;
    Sum probabilities = 0;  // their sum
  };
  static constexpr Sum kNone = -std::numeric_limits<Sum>::infinity();

  /// Sums up the part of the tiles, and of the offsets, that warp `index` has.
  template <class Machine>
  NATTEN_DEVICE void add_biases(Machine& gpu, std::uint32_t index) const {
    const OffsetSums<Sum>& to = in.biases;
    const int part = take(index, to.parts), split = take(index, to.splits);
    if (index >= static_cast<std::uint32_t>(in.heads)) return;
    const int head = static_cast<int>(index), lane = gpu.thread() % kRows;
    Sum* const sums = to.data + (std::int64_t{split} * in.heads + head) * to.count();
    const int first = part * to.lines, past = first + to.lines;
    const int end = past <= 2 * to.before ? past : 2 * to.before + 1;
    const std::int64_t of_batch = in.tiles.total();
    for (std::int64_t i = split; i < to.batches * of_batch; i += to.splits) {
      std::uint32_t number = static_cast<std::uint32_t>(i % of_batch);
      const Span span = in.tiles.whole();
      const Tile tile = in.tiles.tile(number, span);
      if (tile.is_empty) continue;
      const Row row = in.tiles.row(tile, lane, span);
      const View view = in.tiles.template view<kKeyRows>(tile, row, span, in.sights, to.axis,
                                                         {first - to.before, end - to.before});
      RowSum unused;
      sum_row(gpu, {tile, row, span, 0, 0, widened(head), i / of_batch}, view,
              row.is_active ? sums + bias_of_origin(view) : nullptr, unused);
    }
  }

  /// `biases`: the sum of the offset of the column at the origin of the view's box.
  template <class Machine>
  NATTEN_DEVICE void sum_row(Machine& gpu, const Place& at, View view, Sum* biases,
                             RowSum& result) const {
    const Row& row = at.row;
    const std::int64_t head = at.head, batch = at.batch;
    const int first = at.slice * kDims;  // element of the sums
    Sum(&sum)[kDims > 0 ? kDims : 1] = result.sum;
    Sum &largest = result.largest, &total = result.total, &probabilities = result.probabilities;
    Stored* slots = nullptr;
    if constexpr (kWeight == Weight::score) {
      if (row.is_active) slots = in.weights.at(batch, head, widened(row.token));
      if (in.fills_empty && slots)
        for (int i = 0; i < in.window_size; ++i) slots[i] = static_cast<Stored>(in.empty);
    }

    // Scores that are all -inf have that maximum or logsumexp; their weights are exp(-inf - 0) = 0.
    const auto subtrahend = [](Sum x) { return x == kNone ? Sum(0) : x; };
    Sum own_logsumexp = 0, own_term = 0;
    if constexpr (!kKeyRows) {
      if (in.logsumexp)
        own_logsumexp = subtrahend(*in.logsumexp.grid.at(batch, head, widened(row.token)));
      if (in.row_term) own_term = *in.row_term.grid.at(batch, head, widened(row.token));
    }

    const auto of_row = static_cast<int>(head);
    const std::int64_t column_head = widened(kKeyRows ? of_row * in.group : of_row / in.group);
    const std::int64_t query_head = kKeyRows ? column_head : head;
    Columns<const T> a = in.column_a.at(batch, column_head, row);
    Columns<const T> b = in.column_b.at(batch, column_head, row);
    Columns<const T> c = in.column_c.at(batch, column_head, row);
    Columns<const T> attn = in.attn.at(batch, query_head, row);
    if constexpr (!kKeyRows) attn.base = in.attn.grid.at(batch, head, widened(row.token));
    Columns<const Sum> logsumexp = in.logsumexp.at(batch, query_head, row);
    Columns<const Sum> row_term = in.row_term.at(batch, query_head, row);
    const Columns<const std::uint8_t> hidden = in.column_mask.at(batch, 0, row);
    const T* bias = bias_of(view, query_head);
    std::int64_t slot = slot_of_origin(view);

    const int parts = kKeyRows ? in.group : in.additional > 0 ? 2 : 1;
    for (int part = 0; part < parts; ++part) {
      const bool is_additional = !kKeyRows && part == 1;
      if (is_additional) {
        const Place again = place(gpu.opaque(static_cast<int>(gpu.block())), 0);
        const std::int64_t of_columns = again.head / in.group;
        view = view_of_additional(in.additional);
        a = in.column_a.additional_at(again.batch, of_columns);
        b = in.column_b.additional_at(again.batch, of_columns);
        c = in.column_c.additional_at(again.batch, of_columns);
        bias = nullptr;
        slot = in.window_size;
      } else if (part > 0) {  // the next head of queries
        a.base += in.column_a.grid.head;
        b.base += in.column_b.grid.head;
        c.base += in.column_c.grid.head;
        attn.base += in.attn.grid.head;
        logsumexp.base += in.logsumexp.grid.head;
        row_term.base += in.row_term.grid.head;
        if (bias) bias += in.bias.head;
      }
      const Box& box = view.box;
      if (box.is_empty()) continue;
      int begin = 0, left = kNoEnd;  // chunks
      if (kKeyRows && in.splits > 1) {
        left = (box.extent[0] * box.extent[1] * Chunk::per_line(box) + in.splits - 1) / in.splits;
        begin = at.split * left;
      }

      Chunk chunk = Chunk::find(begin, box);
      for (; chunk.is_in(box) && left > 0; --left, chunk.advance(box, in.tiles)) {
        const std::uint32_t all = (1u << chunk.count) - 1;
        std::uint32_t shown = all;
        if (in.column_mask && !is_additional) shown &= shown_of(chunk, hidden);
        const std::uint32_t mask = shown & chunk.mask(view.seen);
        if constexpr (kAddsBiases) {
          if (gpu.all(mask == 0)) continue;
        } else {
          if (mask == 0) continue;
        }

        Sum weight[kChunkColumns];
        if constexpr (kHasScore) {
          const T* vectors[kChunkColumns];
          find_vectors(vectors, chunk, a, 0);
          dot<kVector, kTf32>(weight, in.row_a.at(batch, head, widened(row.token)), vectors,
                              in.score_dims);
          NATTEN_EACH (j, kChunkColumns) weight[j] *= in.scale;
          if (bias) add_bias(weight, mask, chunk, bias);
        } else {
          read_slots(weight, mask, chunk, row, attn, slot);
        }

        Sum correction = 1;
        if constexpr (kWeight == Weight::softmax) {
          Sum larger = largest;
          NATTEN_EACH (j, kChunkColumns)
            if ((mask >> j & 1) && weight[j] > larger) larger = weight[j];
          const Sum from = subtrahend(larger);
          correction = std::exp(largest - from);
          largest = larger;
          NATTEN_EACH (j, kChunkColumns) weight[j] = std::exp(weight[j] - from);
        }
        if constexpr (kWeight == Weight::probability || kIsGrad) {
          const auto of_columns = [&](const Columns<const Sum>& of_queries, Sum own, auto&& use) {
            if constexpr (kKeyRows) {
              chunk.for_each(of_queries.stride,
                             [&](int j, std::int64_t offset) { use(j, of_queries.base[offset]); });
            } else {
              NATTEN_EACH (j, kChunkColumns) use(j, own);
            }
          };
          of_columns(logsumexp, own_logsumexp, [&](int j, Sum x) {
            weight[j] = std::exp(weight[j] - (kKeyRows ? subtrahend(x) : x));
          });
          if constexpr (kIsGrad) {
            Sum grad[kChunkColumns];
            const T* vectors[kChunkColumns];
            find_vectors(vectors, chunk, b, 0);
            dot<kVector, kTf32>(grad, in.row_b.at(batch, head, widened(row.token)), vectors,
                                in.grad_dims);
            of_columns(row_term, own_term, [&](int j, Sum x) { grad[j] -= x; });
            if constexpr (kSumsProbabilities) probabilities += masked_sum(weight, mask);
            NATTEN_EACH (j, kChunkColumns) weight[j] *= grad[j];
          }
        }

        total = total * correction + masked_sum(weight, mask);

        if constexpr (kAddsBiases) {
          // In turns: rows have a column at offsets of their own, and the next one has these too.
          chunk.for_each_in_box(bias_strides().of, [&](int j, std::int64_t offset) {
            if (biases && (mask >> j & 1)) biases[offset] += weight[j];
            gpu.sync_warp();
          });
        } else if constexpr (kDims > 0) {
          const T* vectors[kChunkColumns];
          find_vectors(vectors, chunk, c, first);
          if (shown != all) leave_out(vectors, shown);
          NATTEN_UNROLL
          for (int d = 0; d < kDims; d += kVector) {
            if (first + d >= in.sum_dims) continue;
            Sum of_chunk[kVector] = {};
            NATTEN_EACH (j, kChunkColumns) {
              Sum x[kVector];
              load(x, vectors[j] + d);
              NATTEN_EACH (e, kVector) of_chunk[e] += weight[j] * x[e];
            }
            NATTEN_EACH (e, kVector) sum[d + e] = sum[d + e] * correction + of_chunk[e];
          }
        } else if (slots) {
          for_each_slot(chunk, [&](int j, std::int64_t offset) {
            if (mask >> j & 1) slots[slot + offset] = static_cast<Stored>(weight[j]);
          });
        }
      }
    }
  }

  /// Writes a row's results.
  NATTEN_DEVICE void write(const Place& at, const RowSum& result) const {
    const Row& row = at.row;
    const std::int64_t head = at.head, batch = at.batch;
    const int first = at.slice * kDims;
    if (!row.is_active) return;
    // The sum of P is 1 but for logsumexp's rounding, which is large where scores are; where one
    // key takes nearly all weight, dP and the row term nearly cancel.
    const Sum total = result.total;
    const Sum probabilities = result.probabilities == 0 ? Sum(1) : result.probabilities;
    if constexpr (!kKeyRows)
      if (in.statistic && at.slice == 0) {
        Sum x =
            kWeight == Weight::softmax ? result.largest + std::log(total) : total / probabilities;
        if (in.subtracted) x -= *in.subtracted.at(batch, head, widened(row.token));
        *in.statistic.at(batch, head, widened(row.token)) = x;
      }
    if constexpr (kDims > 0) {
      Sum factor = 1;
      if constexpr (kWeight == Weight::softmax) factor = 1 / (total == 0 ? 1 : total);
      if constexpr (kWeight == Weight::grad_score) factor = in.scale / probabilities;
      const auto write = [&](auto* to) {
        NATTEN_EACH (d, kDims)
          if (first + d < in.sum_dims)
            to[first + d] =
                static_cast<std::remove_reference_t<decltype(*to)>>(result.sum[d] * factor);
      };
      if constexpr (kKeyRows)
        if (in.partial)
          return write(in.partial.at(batch, head, row.token[2]) + at.split * in.partial_split);
      write(in.sums.at(batch, head, widened(row.token)));
    }
  }

  /// Its number is the lowest digit of `index`, which loses it.
  NATTEN_DEVICE Span take_example(std::uint32_t& index) const {
    const Example e = in.examples.data[take(index, in.examples.count)];
    if constexpr (kKeyRows) return {e.first_key, e.keys, e.first_query};
    return {e.first_query, e.queries, e.first_key};
  }

  /// Sets the weights of columns that the row does not see to 0; their sum.
  NATTEN_DEVICE static Sum masked_sum(Sum (&weight)[kChunkColumns], std::uint32_t mask) {
    Sum sum = 0;
    NATTEN_EACH (j, kChunkColumns) {
      if (!(mask >> j & 1)) weight[j] = 0;
      sum += weight[j];
    }
    return sum;
  }

  /// One bit per column of a chunk: whether the key is not hidden.
  NATTEN_DEVICE static std::uint32_t shown_of(const Chunk& chunk,
                                              const Columns<const std::uint8_t>& keys) {
    std::uint32_t shown = 0;
    chunk.for_each(keys.stride, [&](int j, std::int64_t offset) {
      shown |= static_cast<std::uint32_t>(keys.base[offset] != 0) << j;
    });
    return shown;
  }
  /// Puts the vector of a column that is shown in place of those that are not: their weight is 0,
  /// but their elements may be NaN.
  NATTEN_DEVICE static void leave_out(const T* (&vectors)[kChunkColumns], std::uint32_t shown) {
    const T* other = vectors[0];
    NATTEN_EACH (j, kChunkColumns)
      if (shown >> j & 1) other = vectors[j];
    NATTEN_EACH (j, kChunkColumns)
      if (!(shown >> j & 1)) vectors[j] = other;
  }

  /// How slots grow along the axes of a box; of additional tokens, along the last.
  struct Strides {
    std::int64_t of[kMaxRank];
  };
  NATTEN_DEVICE Strides slot_strides() const {
    return {{std::int64_t{in.kernel_size[1]} * in.kernel_size[2], in.kernel_size[2], 1}};
  }
  /// The slot of the column at the origin of a box, which the row need not see.
  NATTEN_DEVICE std::int64_t slot_of_origin(const View& view) const {
    const Strides strides = slot_strides();
    std::int64_t slot = 0;
    for (int i = 0; i < kMaxRank; ++i) slot -= view.slot[i] * strides.of[i];
    return slot;
  }
  template <class F>
  NATTEN_DEVICE void for_each_slot(const Chunk& chunk, F&& f) const {
    chunk.for_each_in_box(slot_strides().of, f);
  }

  /// `queries`: their slots, of which the row has `first_slot` at the origin of the box, where it
  /// is a query itself.
  NATTEN_DEVICE void read_slots(Sum (&to)[kChunkColumns], std::uint32_t mask, const Chunk& chunk,
                                const Row& row, const Columns<const T>& queries,
                                std::int64_t first_slot) const {
    if constexpr (kKeyRows) {
      const Strides strides = slot_strides();
      const auto slot_along = [&](int axis, int place) {  // of the window of the query there
        const Places& along = in.tiles.axes[axis];
        const int query = along.number(row.column[axis], place);
        const int slot = row.place[axis] - in.column_sights.of[axis][query].slot;
        return along.in_turn(slot) * strides.of[axis];
      };
      std::int64_t slot = in.window_size + row.token[2];  // where rows are additional tokens
      if (in.sights.of[0]) slot = slot_along(0, chunk.place(0)) + slot_along(1, chunk.place(1));
      chunk.for_each(queries.stride, [&](int j, std::int64_t offset) {
        to[j] = 0;
        if (!(mask >> j & 1)) return;
        if (in.sights.of[0]) offset += slot_along(2, chunk.place(2) + j);
        to[j] = number(queries.base[offset + slot]);
      });
    } else {
      const T* from = queries.base + first_slot;
      for_each_slot(chunk, [&](int j, std::int64_t offset) {
        to[j] = mask >> j & 1 ? number(from[offset]) : Sum(0);
      });
    }
  }

  /// How offsets grow along the axes of a box, and that of the column at its origin.
  NATTEN_DEVICE Strides bias_strides() const {
    return {{std::int64_t{in.biases.offsets[1]} * in.biases.offsets[2], in.biases.offsets[2], 1}};
  }
  NATTEN_DEVICE std::int64_t bias_of_origin(const View& view) const {
    const Strides strides = bias_strides();
    std::int64_t offset = 0;
    for (int i = 0; i < kMaxRank; ++i)
      offset += (in.kernel_size[i] - 1 - view.own[i]) * strides.of[i];
    return offset;
  }

  static constexpr int kSign = kKeyRows ? -1 : 1;  // offsets of biases are key minus query
  /// The bias of the column at the origin of a box, which the row need not see; null without any.
  NATTEN_DEVICE const T* bias_of(const View& view, std::int64_t query_head) const {
    if (!in.bias) return nullptr;
    Coordinate offset;
    for (int i = 0; i < kMaxRank; ++i) offset[i] = in.kernel_size[i] - 1 - kSign * view.own[i];
    return in.bias.at(0, query_head, offset);
  }
  NATTEN_DEVICE void add_bias(Sum (&to)[kChunkColumns], std::uint32_t mask, const Chunk& chunk,
                              const T* bias) const {
    std::int64_t stride[kMaxRank];
    for (int i = 0; i < kMaxRank; ++i) stride[i] = kSign * in.bias.grid[i];
    chunk.for_each_in_box(stride, [&](int j, std::int64_t offset) {
      if (mask >> j & 1) to[j] += number(bias[offset]);
    });
  }
};

}  // namespace natten::detail::cuda::simt
