#include "memory.h"

#include <natten/error.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string>

#include "validate.h"

namespace natten::detail {
namespace {

/// 0, step, 2 * step, ..., most * step.
struct Term {
  std::int64_t step, most;
};

/// Keeps terms in the order of their steps.
void insert(Term* terms, int& count, const Term& term) {
  int at = count++;
  for (; at > 0 && terms[at - 1].step > term.step; --at) terms[at] = terms[at - 1];
  terms[at] = term;
}

/// Terms of which each adds one of its multiples to a sum.
class Sums {
 public:
  /// Terms come in any order.
  void add(std::int64_t step, std::int64_t most) {
    if (step > 0 && most > 0) insert(terms_, count_, {step, most});
  }

  /// Whether some sum is `target`.
  bool contain(std::int64_t target) {
    merge();
    return contain(count_, target);
  }

 private:
  /// What two terms reach together is again a term where the larger step is a multiple of the
  /// smaller one and leaves no hole. So dimensions that follow each other in memory become one.
  void merge() {
    int kept = 0;
    for (int i = 0; i < count_; ++i) {
      const Term term = terms_[i];
      const auto absorbs = [&](const Term& t) {
        return term.step % t.step == 0 && term.step / t.step <= t.most + 1;
      };
      Term* const into = std::find_if(terms_, terms_ + kept, absorbs);
      if (into == terms_ + kept)
        terms_[kept++] = term;
      else
        into->most += term.step / into->step * term.most;
    }
    count_ = kept;
  }

  /// Whether some sum of the `count` terms with the smallest steps is `target`.
  bool contain(int count, std::int64_t target) {
    if (count == 0) return target == 0;
    std::int64_t others = 0, divisor = 0;  // what all others add up to; what divides all but one
    for (int i = 0; i < count - 1; ++i) others += terms_[i].step * terms_[i].most;
    for (int i = 1; i < count; ++i) divisor = std::gcd(divisor, terms_[i].step);
    if (divisor > terms_[0].step * terms_[0].most &&
        target % divisor > terms_[0].step * terms_[0].most)
      return false;
    const Term& last = terms_[count - 1];
    const std::int64_t least = target > others ? (target - others + last.step - 1) / last.step : 0;
    for (std::int64_t i = std::min(last.most, target / last.step); i >= least; --i)
      if (--steps_left_ < 0 || contain(count - 1, target - i * last.step)) return true;
    return false;
  }

  Term terms_[2 * kMaxDims + 1];
  int count_ = 0;
  int steps_left_ = 1 << 14;
};

/// The bytes from a tensor's first in memory to past its last.
struct Span {
  std::uintptr_t begin, end;
  const Use* use;
};

Span span_of(const Use& use) {
  const TensorView& v = *use.view;
  const auto element = static_cast<std::int64_t>(size_of(v.dtype));
  std::int64_t below = 0, above = element;
  for (int i = 0; i < v.ndim; ++i) {
    const std::int64_t reach = (v.shape[i] - 1) * v.strides[i] * element;
    (reach < 0 ? below : above) += reach;
  }
  const auto at = reinterpret_cast<std::uintptr_t>(v.data);
  return {at + static_cast<std::uintptr_t>(below), at + static_cast<std::uintptr_t>(above), &use};
}

/// Whether a byte belongs to both tensors, whose spans intersect.
bool share_memory(const Span& a, const Span& b) {
  Sums sums;  // of an offset in `a` and the distance of an offset in `b` from its end
  std::int64_t bytes = -2;
  for (const Span* span : {&a, &b}) {
    const TensorView& v = *span->use->view;
    const auto element = static_cast<std::int64_t>(size_of(v.dtype));
    for (int i = 0; i < v.ndim; ++i)
      if (v.shape[i] > 1) sums.add(std::abs(v.strides[i]) * element, v.shape[i] - 1);
    bytes += element;
  }
  sums.add(1, bytes);
  return sums.contain(static_cast<std::int64_t>(b.end - 1 - a.begin));
}

/// Whether two elements of a tensor are the same memory.
bool overlaps_itself(const TensorView& v) {
  Term dims[kMaxDims];
  int count = 0;
  for (int i = 0; i < v.ndim; ++i)
    if (v.shape[i] > 1) insert(dims, count, {std::abs(v.strides[i]), v.shape[i] - 1});
  // Two such elements differ in dimension i, and else only in dimensions of smaller steps, by
  // which they would have to be brought together again.
  std::int64_t reach = 0;
  for (int i = 0; i < count; ++i) {
    if (dims[i].step <= reach) {
      if (dims[i].step == 0) return true;
      // Differences in smaller dimensions, from -reach on, and what 1 to `most` steps of this
      // one leave of all its steps.
      Sums sums;
      for (int j = 0; j < i; ++j) sums.add(dims[j].step, 2 * dims[j].most);
      sums.add(dims[i].step, dims[i].most - 1);
      if (sums.contain(reach + dims[i].most * dims[i].step)) return true;
    }
    reach += dims[i].step * dims[i].most;
  }
  return false;
}

std::string of_call(const Use& use, std::size_t calls, const char* before, const char* after) {
  return calls > 1 ? before + std::to_string(use.call) + after : std::string();
}

}  // namespace

void check_memory(const std::vector<Use>& uses, std::size_t calls) {
  std::vector<Span> spans;
  spans.reserve(uses.size());
  for (const Use& use : uses) {
    const TensorView& view = *use.view;
    if (!view || view.size() == 0) continue;
    if (use.is_output && overlaps_itself(view))
      throw Error(ErrorKind::invalid_value,
                  std::string(use.name) + ": got strides " +
                      to_string(view.strides.data(), view.ndim) + " for shape " +
                      to_string(view.shape.data(), view.ndim) +
                      "; its elements must not overlap, as they are written");
    spans.push_back(span_of(use));
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (auto a = spans.begin(); a != spans.end(); ++a)
    for (auto b = a + 1; b != spans.end() && b->begin < a->end; ++b) {
      if (!(a->use->is_output || b->use->is_output) || !share_memory(*a, *b)) continue;
      const Use& output = a->use->is_output ? *a->use : *b->use;
      const Use& other = a->use->is_output ? *b->use : *a->use;
      throw Error(ErrorKind::invalid_value,
                  output.name + (": " + of_call(output, calls, "that of call ", " ")) +
                      "shares memory with " + other.name + of_call(other, calls, " of call ", "") +
                      "; an output must not overlap an input or another output");
    }
}

}  // namespace natten::detail
