#pragma once

// From scores to weights, and from gradients of weights to gradients of scores.

#include <cmath>

#include "worker.h"

namespace natten::detail::cuda {

/// The sum, or the largest, of a row's four threads.
template <class K, class Machine>
NATTEN_DEVICE float row_sum(const Worker<K, Machine>& w, float x) {
  x += w.gpu.shuffle_xor(x, 1);
  return x + w.gpu.shuffle_xor(x, 2);
}
template <class K, class Machine>
NATTEN_DEVICE float row_max(const Worker<K, Machine>& w, float x) {
  x = std::fmax(x, w.gpu.shuffle_xor(x, 1));
  return std::fmax(x, w.gpu.shuffle_xor(x, 2));
}

/// Turns scores into weights 2^(factor score - reference), and adds them to this thread's share
/// of the rows' totals. A row's reference is a largest score of the past: it follows, and what
/// was summed is rescaled, only once weights would exceed 2^8, which float16 holds and which is
/// rare after the first tiles.
template <class K, class Machine>
NATTEN_DEVICE void softmax(const Worker<K, Machine>& w, typename K::Scores& scores,
                           typename K::RowSums& sums, typename K::PerRow& totals) {
  constexpr float kSlack = 8;
  float most[K::kM][2], reference[K::kM][2];
  const int first_row = w.row_of(0, 0);
  bool is_near = true;
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      float x = kNone;
      NATTEN_EACH (n, K::kN)
        NATTEN_EACH (j, 2) x = std::fmax(x, scores[m][n][2 * half + j]);
      most[m][half] = x * w.a.factor;
      reference[m][half] = w.references()[first_row + 16 * m + 8 * half];
      is_near = is_near && most[m][half] <= reference[m][half] + kSlack;
    }
  if (!w.gpu.all(is_near)) {
    w.gpu.sync_warp();  // four lanes read a row's reference, and each may write it
    NATTEN_EACH (m, K::kM)
      NATTEN_EACH (half, 2) {
        float& past = reference[m][half];
        const float now = std::fmax(past, row_max(w, most[m][half]));
        // Before a row has seen anything its sums are 0, and 0 * 2^-inf too.
        const float correction = now == kNone ? 1.0f : w.gpu.exp2(past - now);
        past = now;
        w.references()[first_row + 16 * m + 8 * half] = now;
        totals[m][half] *= correction;
        NATTEN_EACH (n, K::kDims / 8)
          NATTEN_EACH (j, 2) sums[m][n][2 * half + j] *= correction;
      }
  }
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      const float added = reference[m][half] == kNone ? 0.0f : -reference[m][half];
      NATTEN_EACH (n, K::kN)
        NATTEN_EACH (j, 2) {
          float& x = scores[m][n][2 * half + j];
          x = w.gpu.exp2(std::fma(x, w.a.factor, added));
          totals[m][half] += x;
        }
    }
}

/// What a sum of weights divides by. All are 0 where all scores are -inf, and so is what they
/// weigh.
NATTEN_DEVICE float divisor(float total) { return total == 0 ? 1.0f : total; }

/// What is subtracted from scores to base 2. A row whose scores are all -inf has that logsumexp
/// too, and its weights are exp2(-inf - 0) = 0.
NATTEN_DEVICE float subtrahend(float logsumexp) {
  return logsumexp == kNone ? 0.0f : logsumexp * kLog2E;
}
/// Turns the columns' logsumexp into subtrahends: each thread the one that it has copied.
template <class K, class Machine>
NATTEN_DEVICE void scale_statistics(const Worker<K, Machine>& w, int stage) {
  if (w.thread() >= K::kColumns) return;
  float& x = w.gpu.template shared<float>(w.statistics(0, stage))[w.thread()];
  x = subtrahend(x);
}

/// Statistics of queries: of this thread's rows, or of the columns in shared memory.
template <class K>
struct QueryStatistics {
  typename K::PerRow subtrahend, row_term;
};
template <class K, class Machine>
NATTEN_DEVICE QueryStatistics<K> row_statistics(const Worker<K, Machine>& w) {
  QueryStatistics<K> s;
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      Coordinate token;
      const bool exists = w.token_of_row(w.row_of(m, half), token);
      s.subtrahend[m][half] =
          exists ? subtrahend(*w.a.logsumexp.at(w.state.batch, w.state.head, token)) : 0.0f;
      s.row_term[m][half] = K::kSumsFirst && !K::kFindsTerm && exists
                                ? *w.a.row_term.at(w.state.batch, w.state.head, token)
                                : 0.0f;
    }
  return s;
}

/// Turns scores into the weights P of the forward pass.
template <class K, class Machine>
NATTEN_DEVICE void weigh(const Worker<K, Machine>& w, typename K::Scores& scores,
                         const QueryStatistics<K>& of_rows, int stage) {
  NATTEN_EACH (n, K::kN)
    NATTEN_EACH (j, 2) {
      float of_column = 0;
      if constexpr (!K::kRowsAreQueries)
        of_column = w.gpu.template shared<float>(w.statistics(0, stage))[w.column_of(n) + j];
      NATTEN_EACH (m, K::kM)
        NATTEN_EACH (half, 2) {
          float& x = scores[m][n][2 * half + j];
          x = w.gpu.exp2(x * w.a.factor -
                         (K::kRowsAreQueries ? of_rows.subtrahend[m][half] : of_column));
        }
    }
}
/// Turns dP into dS.
template <class K, class Machine>
NATTEN_DEVICE void differentiate(const Worker<K, Machine>& w, typename K::Scores& grads,
                                 const typename K::Scores& weights,
                                 const QueryStatistics<K>& of_rows, int stage) {
  NATTEN_EACH (n, K::kN)
    NATTEN_EACH (j, 2) {
      float of_column = 0;
      if constexpr (!K::kRowsAreQueries)
        of_column = w.gpu.template shared<float>(w.statistics(1, stage))[w.column_of(n) + j];
      NATTEN_EACH (m, K::kM)
        NATTEN_EACH (half, 2) {
          const int i = 2 * half + j;
          const float term = K::kRowsAreQueries ? of_rows.row_term[m][half] : of_column;
          grads[m][n][i] = weights[m][n][i] * (grads[m][n][i] - term);
        }
    }
}

/// Adds weights to `totals`, and their products with `grads` to `products`.
template <class K>
NATTEN_DEVICE void add_products(typename K::PerRow& totals, typename K::PerRow& products,
                                const typename K::Scores& weights,
                                const typename K::Scores& grads) {
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      float total = 0, product = 0;
      NATTEN_EACH (n, K::kN)
        NATTEN_EACH (j, 2) {
          const float weight = weights[m][n][2 * half + j];
          total += weight;
          product += weight * grads[m][n][2 * half + j];
        }
      totals[m][half] += total;
      products[m][half] += product;
    }
}

/// Moves the row term, sum P dP / sum P - gradient of logsumexp, to that of all that has been seen,
/// and the sum of dS by as much, by the sum of P. What is moved so, in sums of rounded weights, is
/// small: each tile counts by the row term that has it, so a key that takes nearly all weight by
/// nearly its own dP.
template <class K, class Machine>
NATTEN_DEVICE void move_row_term(const Worker<K, Machine>& w, Accumulators<K>& sums,
                                 const typename K::Scores& weights, const typename K::Scores& grads,
                                 QueryStatistics<K>& of_rows) {
  typename K::PerRow totals{}, products{};
  add_products<K>(totals, products, weights, grads);
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      const float total = sums.totals[m][half] += row_sum(w, totals[m][half]);
      const float product = sums.products[m][half] += row_sum(w, products[m][half]);
      float now = product / divisor(total);
      if (w.a.grad_logsumexp) {  // rare, so read again rather than held in registers
        Coordinate token;
        if (w.token_of_row(w.row_of(m, half), token))
          now -= *w.a.grad_logsumexp.at(w.state.batch, w.state.head, token);
      }
      const float step = of_rows.row_term[m][half] - now;
      of_rows.row_term[m][half] = now;
      NATTEN_EACH (n, K::kDims / 8)
        NATTEN_EACH (j, 2)
          sums.first[m][n][2 * half + j] += step * sums.first[K::kM + m][n][2 * half + j];
    }
}

}  // namespace natten::detail::cuda
