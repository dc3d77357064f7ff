#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "tensors.h"

/// The operations by their definition, dense and in float64. Shares no code with the library, the
/// neighborhood included.
namespace natten_tests::oracle {

struct Axis {
  std::int64_t length = 1, kernel_size = 1, stride = 1, dilation = 1;
  bool is_causal = false;
  natten::Boundary boundary = natten::Boundary::shift;
  /// The parts that are given: their first tokens and how many; -1 for all.
  std::int64_t query_offset = 0, key_offset = 0, given_queries = -1, given_keys = -1;

  std::int64_t queries() const { return given_queries < 0 ? length : given_queries; }
  std::int64_t keys() const { return given_keys < 0 ? length : given_keys; }
  bool is_part() const { return given_queries >= 0 || given_keys >= 0; }
};

/// A key that a query sees: its token, its slot among the query's attention weights, and the index
/// of its relative position in a bias.
struct Pair {
  std::int64_t key, slot, offset;
};
/// The keys of each query.
using Pairs = std::vector<std::vector<Pair>>;

/// Constructs the windows of one axis: splits it into dilation groups, those into blocks of
/// `stride` queries, picks each block's leader and moves a window into the group token by token,
/// leaves out what lies outside, or takes it from the other end.
inline Pairs pairs_of(const Axis& axis) {
  Pairs pairs(index(axis.length));
  for (std::int64_t group = 0; group < axis.dilation; ++group) {
    std::vector<std::int64_t> tokens;
    for (std::int64_t i = 0; i < axis.length; ++i)
      if (i % axis.dilation == group) tokens.push_back(i);
    const auto n = static_cast<std::int64_t>(tokens.size());
    for (std::int64_t block = 0; block < n; block += axis.stride) {
      std::vector<std::int64_t> members;
      for (std::int64_t p = block; p < block + axis.stride && p < n; ++p) members.push_back(p);
      const std::int64_t wanted = axis.is_causal ? axis.stride - 1 : axis.stride / 2;
      const std::int64_t leader =
          wanted < static_cast<std::int64_t>(members.size()) ? members[index(wanted)] : n - 1;
      for (std::int64_t query : members) {
        std::vector<std::int64_t> window;
        if (axis.is_causal) {
          for (std::int64_t p = 0; p <= query; ++p)
            if (p > leader - axis.kernel_size) window.push_back(p);
        } else {
          std::int64_t begin = leader - axis.kernel_size / 2;
          while (begin < 0 && axis.boundary == natten::Boundary::shift) ++begin;
          while (begin + axis.kernel_size > n && axis.boundary == natten::Boundary::shift) --begin;
          for (std::int64_t p = begin; p < begin + axis.kernel_size; ++p) window.push_back(p);
        }
        for (std::size_t slot = 0; slot < window.size(); ++slot) {
          std::int64_t key = window[slot];
          const std::int64_t offset = key - query + axis.kernel_size - 1;
          if (axis.boundary == natten::Boundary::circular) {
            while (key < 0) key += n;
            while (key >= n) key -= n;
          }
          if (key < 0 || key >= n) continue;
          pairs[index(tokens[index(query)])].push_back(
              {tokens[index(key)], static_cast<std::int64_t>(slot), offset});
        }
      }
    }
  }
  return pairs;
}

/// The pairs of the parts that are given, everything numbered in these.
inline Pairs given_pairs_of(const Axis& axis) {
  const Pairs whole = pairs_of(axis);
  Pairs given;
  for (std::int64_t q = 0; q < axis.queries(); ++q) {
    given.push_back(whole[index(axis.query_offset + q)]);
    for (Pair& pair : given.back()) {
      std::int64_t number = 0;  // of the given key that is this token
      const auto is_it = [&](std::int64_t token) {
        return axis.boundary == natten::Boundary::circular ? (token - pair.key) % axis.length == 0
                                                           : token == pair.key;
      };
      while (number < axis.keys() && !is_it(axis.key_offset + number)) ++number;
      if (number == axis.keys()) throw std::logic_error("a key that is needed is not given");
      pair.key = number;
    }
  }
  return given;
}

/// The product over axes, everything numbered row-major.
inline Pairs pairs_of(const std::vector<Axis>& axes) {
  Pairs pairs{{{0, 0, 0}}};
  for (const Axis& axis : axes) {
    const Pairs along = given_pairs_of(axis);
    Pairs product;
    for (const auto& outer : pairs)
      for (const auto& inner : along) {
        std::vector<Pair> row;
        for (const Pair& a : outer)
          for (const Pair& b : inner)
            row.push_back({a.key * axis.keys() + b.key, a.slot * axis.kernel_size + b.slot,
                           a.offset * (2 * axis.kernel_size - 1) + b.offset});
        product.push_back(row);
      }
    pairs = product;
  }
  return pairs;
}

/// Attention over all keys; causal is aligned at the first token.
inline Pairs all_pairs(std::int64_t queries, std::int64_t keys, bool is_causal) {
  Pairs pairs(index(queries));
  for (std::int64_t q = 0; q < queries; ++q)
    for (std::int64_t k = 0; k < keys; ++k)
      if (!is_causal || k <= q) pairs[index(q)].push_back({k, k, 0});
  return pairs;
}

/// The pairs of each batch entry in turn, without the keys that a mask [batch or 1, keys] hides.
inline Pairs masked(const Pairs& pairs, const Dense& mask, std::int64_t batch, std::int64_t keys) {
  Pairs all;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::vector<Pair> row : pairs) {
      const std::int64_t first = mask.shape[0] == 1 ? 0 : b * keys;
      row.erase(std::remove_if(row.begin(), row.end(),
                               [&](const Pair& pair) { return mask[first + pair.key] == 0; }),
                row.end());
      all.push_back(row);
    }
  return all;
}
/// Those of a query of a batch entry, of pairs that are all batch entries' or of each.
inline const std::vector<Pair>& row_of(const Pairs& pairs, std::int64_t queries, std::int64_t batch,
                                       std::int64_t query) {
  return pairs[index(static_cast<std::int64_t>(pairs.size()) == queries ? query
                                                                        : batch * queries + query)];
}

/// Sizes shared by all tensors of a call. `window` is the product of kernel sizes.
struct Sizes {
  std::int64_t batch, heads, kv_heads, dim, value_dim, additional;
  std::int64_t queries, keys, window, offsets;
};

/// What fused attention reads. Tensors that are not given are empty; shapes beyond sizes do not
/// matter, so a grid of any rank is a row of tokens here.
struct FusedInputs {
  Sizes n;
  Pairs pairs;
  double scale;
  Dense query, key, value, rpb, additional_keys, additional_values;
  Dense grad_output, grad_logsumexp;
};

struct FusedResults {
  Dense output, logsumexp;
  Dense grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values;
};

namespace internal {

/// Index of the first element of a heads-last row [batch, tokens, heads, dim].
inline std::int64_t row_of(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t tokens,
                           std::int64_t heads, std::int64_t dim) {
  return ((b * tokens + t) * heads + h) * dim;
}

template <class Real = double>
Real dot(const Dense& a, std::int64_t i, const Dense& b, std::int64_t j, std::int64_t n) {
  Real sum = 0;
  for (std::int64_t d = 0; d < n; ++d)
    sum += static_cast<Real>(a[i + d]) * static_cast<Real>(b[j + d]);
  return sum;
}
inline void add(Dense& to, std::int64_t i, double factor, const Dense& from, std::int64_t j,
                std::int64_t n) {
  for (std::int64_t d = 0; d < n; ++d) to[i + d] += factor * from[j + d];
}

/// Attention weights of one batch entry and head, a column per key and then per additional token.
/// Masked entries are no numbers to compute with, lest a NaN behind the mask show.
template <class Real>
struct Matrix {
  std::int64_t columns;
  std::vector<Real> values;
  std::vector<std::int64_t> offsets;  // -1: masked; columns of additional tokens have offset 0
  Matrix(std::int64_t rows, std::int64_t cols)
      : columns(cols), values(index(rows * cols)), offsets(index(rows * cols), -1) {}
  Real& at(std::int64_t r, std::int64_t c) { return values[index(r * columns + c)]; }
  std::int64_t& offset(std::int64_t r, std::int64_t c) { return offsets[index(r * columns + c)]; }
  bool sees(std::int64_t r, std::int64_t c) { return offset(r, c) >= 0; }
};

}  // namespace internal

/// Forward, and backward where grad_output is given. `Real` is the type of scores, weights and
/// their gradients, so that float shows what the format costs; their products are summed in
/// float64.
template <class Real = double>
FusedResults fused(const FusedInputs& in) {
  using namespace internal;
  const Sizes& n = in.n;
  const std::int64_t columns = n.keys + n.additional;
  FusedResults out;
  out.output = Dense({n.batch, n.queries, n.heads, n.value_dim});
  out.logsumexp = Dense({n.batch, n.queries, n.heads});
  out.grad_query = Dense({n.batch, n.queries, n.heads, n.dim});
  out.grad_key = Dense({n.batch, n.keys, n.kv_heads, n.dim});
  out.grad_value = Dense({n.batch, n.keys, n.kv_heads, n.value_dim});
  out.grad_rpb = Dense({n.heads, n.offsets});
  out.grad_additional_keys = Dense({n.batch, n.additional, n.kv_heads, n.dim});
  out.grad_additional_values = Dense({n.batch, n.additional, n.kv_heads, n.value_dim});

  for (std::int64_t b = 0; b < n.batch; ++b)
    for (std::int64_t h = 0; h < n.heads; ++h) {
      const std::int64_t kv = h / (n.heads / n.kv_heads);
      // A column is a key of the grid or an additional one: the tensor and the row in it.
      const auto from = [&](std::int64_t c, auto& grid, auto& additional, std::int64_t dim,
                            auto&& use) {
        if (c < n.keys)
          use(grid, row_of(b, c, kv, n.keys, n.kv_heads, dim));
        else
          use(additional, row_of(b, c - n.keys, kv, n.additional, n.kv_heads, dim));
      };

      Matrix<Real> score(n.queries, columns);
      for (std::int64_t q = 0; q < n.queries; ++q) {
        for (const Pair& pair : oracle::row_of(in.pairs, n.queries, b, q))
          score.offset(q, pair.key) = pair.offset;
        for (std::int64_t c = n.keys; c < columns; ++c) score.offset(q, c) = 0;
        const std::int64_t row = row_of(b, q, h, n.queries, n.heads, n.dim);
        for (std::int64_t c = 0; c < columns; ++c) {
          if (!score.sees(q, c)) continue;
          from(c, in.key, in.additional_keys, n.dim, [&](const Dense& key, std::int64_t at) {
            score.at(q, c) = static_cast<Real>(in.scale) * dot<Real>(in.query, row, key, at, n.dim);
          });
          if (in.rpb.is_given() && c < n.keys)
            score.at(q, c) += static_cast<Real>(in.rpb[h * n.offsets + score.offset(q, c)]);
        }
      }

      for (std::int64_t q = 0; q < n.queries; ++q) {
        Real largest = -std::numeric_limits<Real>::infinity(), total = 0;
        for (std::int64_t c = 0; c < columns; ++c)
          if (score.sees(q, c)) largest = std::max(largest, score.at(q, c));
        // Where all scores are -inf all weights are 0.
        const double shift = std::isinf(largest) && largest < 0 ? 0 : largest;
        for (std::int64_t c = 0; c < columns; ++c)
          if (score.sees(q, c)) total += std::exp(score.at(q, c) - shift);
        out.logsumexp[(b * n.queries + q) * n.heads + h] = largest + std::log(total);
        const double divisor = total == 0 ? 1 : total;

        Matrix<Real>& weight = score;  // softmax in place
        for (std::int64_t c = 0; c < columns; ++c)
          if (score.sees(q, c)) weight.at(q, c) = std::exp(score.at(q, c) - shift) / divisor;
        const std::int64_t row = row_of(b, q, h, n.queries, n.heads, n.value_dim);
        for (std::int64_t c = 0; c < columns; ++c)
          if (weight.sees(q, c))
            from(c, in.value, in.additional_values, n.value_dim,
                 [&](const Dense& value, std::int64_t at) {
                   add(out.output, row, weight.at(q, c), value, at, n.value_dim);
                 });
        if (!in.grad_output.is_given()) continue;

        // The row of dP = grad_output value^T, then dS = P * (dP - sum P * dP + grad_logsumexp).
        std::vector<Real> grad(index(columns));
        Real sum = 0;
        for (std::int64_t c = 0; c < columns; ++c) {
          if (!weight.sees(q, c)) continue;
          from(c, in.value, in.additional_values, n.value_dim,
               [&](const Dense& value, std::int64_t at) {
                 grad[index(c)] = dot<Real>(in.grad_output, row, value, at, n.value_dim);
               });
          sum += weight.at(q, c) * grad[index(c)];
        }
        if (in.grad_logsumexp.is_given())
          sum -= static_cast<Real>(in.grad_logsumexp[(b * n.queries + q) * n.heads + h]);
        const std::int64_t query_row = row_of(b, q, h, n.queries, n.heads, n.dim);
        for (std::int64_t c = 0; c < columns; ++c) {
          if (!weight.sees(q, c)) continue;
          const Real grad_score = weight.at(q, c) * (grad[index(c)] - sum);
          from(c, in.key, in.additional_keys, n.dim, [&](const Dense& key, std::int64_t at) {
            add(out.grad_query, query_row, in.scale * grad_score, key, at, n.dim);
          });
          from(c, out.grad_key, out.grad_additional_keys, n.dim, [&](Dense& to, std::int64_t at) {
            add(to, at, in.scale * grad_score, in.query, query_row, n.dim);
          });
          from(c, out.grad_value, out.grad_additional_values, n.value_dim,
               [&](Dense& to, std::int64_t at) {
                 add(to, at, weight.at(q, c), in.grad_output, row, n.value_dim);
               });
          if (c < n.keys) out.grad_rpb[h * n.offsets + score.offset(q, c)] += grad_score;
        }
      }
    }
  return out;
}

/// Calls `f(row of the query's head, batch * heads + head, pair)` for all pairs of all heads of a
/// heads-first tensor, additional tokens included (`pair.key` is then their number and
/// `is_additional`).
template <class F>
void for_each_slot(const Sizes& n, const Pairs& pairs, F&& f) {
  for (std::int64_t bh = 0; bh < n.batch * n.heads; ++bh)
    for (std::int64_t q = 0; q < n.queries; ++q) {
      const std::int64_t row = bh * n.queries + q;
      for (const Pair& pair : row_of(pairs, n.queries, bh / n.heads, q))
        f(row, pair.slot, bh * n.keys + pair.key, false, bh % n.heads * n.offsets + pair.offset);
      for (std::int64_t i = 0; i < n.additional; ++i)
        f(row, n.window + i, bh * n.additional + i, true, std::int64_t{0});
    }
}

/// attn [B, H, T, K + N]; `empty` fills the slots without a key.
inline Dense qk(const Sizes& n, const Pairs& pairs, const Dense& query, const Dense& key,
                const Dense& rpb, const Dense& additional_keys, double empty) {
  const std::int64_t slots = n.window + n.additional;
  Dense attn({n.batch, n.heads, n.queries, slots}, empty);
  for_each_slot(n, pairs, [&](auto row, auto slot, auto token, bool is_additional, auto offset) {
    const Dense& from = is_additional ? additional_keys : key;
    double sum = internal::dot(query, row * n.dim, from, token * n.dim, n.dim);
    if (rpb.is_given() && !is_additional) sum += rpb[offset];
    attn[row * slots + slot] = sum;
  });
  return attn;
}

inline Dense av(const Sizes& n, const Pairs& pairs, const Dense& attn, const Dense& value,
                const Dense& additional_values) {
  Dense output({n.batch, n.heads, n.queries, n.dim});
  for_each_slot(n, pairs, [&](auto row, auto slot, auto token, bool is_additional, auto) {
    internal::add(output, row * n.dim, attn[row * (n.window + n.additional) + slot],
                  is_additional ? additional_values : value, token * n.dim, n.dim);
  });
  return output;
}

struct KeySums {
  Dense key, additional_keys;
};
inline KeySums av_transpose(const Sizes& n, const Pairs& pairs, const Dense& attn,
                            const Dense& query) {
  KeySums sums{Dense({n.batch, n.heads, n.keys, n.dim}),
               Dense({n.batch, n.heads, n.additional, n.dim})};
  for_each_slot(n, pairs, [&](auto row, auto slot, auto token, bool is_additional, auto) {
    internal::add(is_additional ? sums.additional_keys : sums.key, token * n.dim,
                  attn[row * (n.window + n.additional) + slot], query, row * n.dim, n.dim);
  });
  return sums;
}

inline Dense rpb_gather(const Sizes& n, const Pairs& pairs, const Dense& rpb, double empty) {
  const std::int64_t slots = n.window + n.additional;
  Dense attn({n.batch, n.heads, n.queries, slots}, empty);
  for_each_slot(n, pairs, [&](auto row, auto slot, auto, bool is_additional, auto offset) {
    attn[row * slots + slot] = is_additional ? 0.0 : rpb[offset];
  });
  return attn;
}

inline Dense rpb_scatter(const Sizes& n, const Pairs& pairs, const Dense& attn) {
  Dense grad({n.heads, n.offsets});
  for_each_slot(n, pairs, [&](auto row, auto slot, auto, bool is_additional, auto offset) {
    if (!is_additional) grad[offset] += attn[row * (n.window + n.additional) + slot];
  });
  return grad;
}

}  // namespace natten_tests::oracle
