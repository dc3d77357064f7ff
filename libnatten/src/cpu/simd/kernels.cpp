// Compiled once per instruction set, with NATTEN_ISA naming it and NATTEN_VECTOR_BYTES; with
// NATTEN_PAIRS, only what such a set has beside that of another, for pairs of bfloat16. Everything
// is in an unnamed namespace and nothing from the standard library or the other headers is used, so
// that the object file shares no inline function with code for other processors. The files *-inl.h
// are parts of this one.

#include "kernels.h"

#include "backward_key-inl.h"
#include "backward_query-inl.h"
#include "count-inl.h"
#include "forward-inl.h"
#include "packing-inl.h"
#include "stream-inl.h"
#include "unfused-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Those of fused passes.
template <class F, class T = typename F::Sum>
constexpr Kernels<T> kernels_of() {
  Kernels<T> k{};
  k.forward = forward<F>;
  k.finish = finish<T>;
  k.backward_query = backward_query<F>;
  k.backward_key = backward_key<F>;
  k.count = count<T>;
  // Of weights, their gradients and, if these are in pairs of steps, pairs of rows.
  k.scratch_elements =
      static_cast<std::size_t>((F::kCount > 1 ? 3 : 2) * kMostVectors * kScores<T>);
  k.batch_elements = static_cast<std::size_t>(kMostVectors * kScores<T>);
  k.width = kWidth<T>;
  return k;
}

#if !NATTEN_PAIRS
template <class T>
constexpr Kernels<T> kernels() {
  Kernels<T> k = kernels_of<Single<T>>();
  // By DType, of which float64 comes first.
  if constexpr (sizeof(T) == sizeof(double)) {
    k.stream[0] = stream<Same<double>>;
  } else {
    k.stream[1] = stream<Same<float>>;
    k.stream[2] = stream<BFloat16>;
    k.stream[3] = stream<Float16>;
  }
  k.score = score<T>;
  k.weigh = weigh<T>;
  return k;
}

constexpr Conversions conversions() {
  Conversions c{};
  c.pack_f64 = pack<Same<double>>;
  c.unpack_f64 = unpack<Same<double>>;
  // By DType, of which float64 comes first.
  c.pack[1] = pack<Same<float>>;
  c.pack[2] = pack<BFloat16>;
  c.pack[3] = pack<Float16>;
  c.unpack[1] = unpack<Same<float>>;
  c.unpack[2] = unpack<BFloat16>;
  c.unpack[3] = unpack<Float16>;
  return c;
}
#endif

}  // namespace

#define NATTEN_CONCAT(a, b) a##b
#define NATTEN_NAMED(a, b) NATTEN_CONCAT(a, b)
#define NATTEN_TEXT_OF(a) #a
#define NATTEN_TEXT(a) NATTEN_TEXT_OF(a)

#if NATTEN_PAIRS
extern const PairKernels NATTEN_NAMED(isa_, NATTEN_ISA);
const PairKernels NATTEN_NAMED(isa_, NATTEN_ISA) = {kernels_of<Pair>(), pack_pairs};
#else
extern const InstructionSet NATTEN_NAMED(isa_, NATTEN_ISA);
const InstructionSet NATTEN_NAMED(isa_, NATTEN_ISA) = {
    NATTEN_TEXT(NATTEN_ISA), kernels<float>(), kernels<double>(), conversions(), {}};
#endif

}  // namespace natten::detail::cpu::simd
