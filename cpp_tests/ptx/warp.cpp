#include "warp.h"

#include <natten/half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

namespace natten_tests::ptx {
namespace {

template <class T>
T get(const char* lanes, int lane) {
  T x;
  std::memcpy(&x, lanes + static_cast<std::size_t>(lane) * sizeof x, sizeof x);
  return x;
}
template <class T>
void put(char* lanes, int lane, T x) {
  std::memcpy(lanes + static_cast<std::size_t>(lane) * sizeof x, &x, sizeof x);
}

template <class F>
void for_each_lane(std::uint32_t lanes, F&& f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

[[noreturn]] void unknown(const char* what) {
  throw Fault(std::string(what) + " of this type is not known");
}

template <class F>
void with_integer(Type type, F&& f) {
  switch (type) {
    case Type::u8: return f(std::uint8_t{});
    case Type::u16: return f(std::uint16_t{});
    case Type::u32: return f(std::uint32_t{});
    case Type::u64: return f(std::uint64_t{});
    case Type::s8: return f(std::int8_t{});
    case Type::s16: return f(std::int16_t{});
    case Type::s32: return f(std::int32_t{});
    case Type::s64: return f(std::int64_t{});
    default: unknown("an operation");
  }
}
template <class F>
void with_number(Type type, F&& f) {
  if (type == Type::f32) return f(float{});
  if (type == Type::f64) return f(double{});
  with_integer(type, f);
}

/// Of integers, without overflow that C++ leaves open.
template <class T, class F>
T wrapped(T a, T b, F&& f) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(f(static_cast<std::uint64_t>(a), static_cast<std::uint64_t>(b)));
  else
    return f(a, b);
}

/// PTX: a NaN loses against a number, and -0 is less than +0.
template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a < b ? b : a;
}

template <class T>
bool holds(Comparison comparison, T a, T b) {
  bool has_nan = false;
  if constexpr (std::is_floating_point_v<T>) has_nan = std::isnan(a) || std::isnan(b);
  switch (comparison) {
    case Comparison::eq: return a == b;
    case Comparison::ne: return a != b && !has_nan;
    case Comparison::lt: return a < b;
    case Comparison::le: return a <= b;
    case Comparison::gt: return a > b;
    case Comparison::ge: return a >= b;
    case Comparison::equ: return has_nan || a == b;
    case Comparison::neu: return has_nan || a != b;
    case Comparison::ltu: return has_nan || a < b;
    case Comparison::leu: return has_nan || a <= b;
    case Comparison::gtu: return has_nan || a > b;
    case Comparison::geu: break;
  }
  return has_nan || a >= b;
}

/// The first `bytes` of `x`, extended to a register of any width.
template <class T>
void put_extended(char* lanes, int bytes, int lane, T x) {
  if constexpr (std::is_integral_v<T>) {
    switch (bytes) {
      case 2: return put(lanes, lane, static_cast<std::uint16_t>(x));
      case 4: return put(lanes, lane, static_cast<std::uint32_t>(static_cast<std::int64_t>(x)));
      default: return put(lanes, lane, static_cast<std::uint64_t>(static_cast<std::int64_t>(x)));
    }
  } else {
    put(lanes, lane, x);
  }
}
/// The low part of a register that may be wider.
template <class T>
T get_low(const Operand& operand, const char* lanes, int lane) {
  T x;
  std::memcpy(&x, lanes + static_cast<std::size_t>(lane) * static_cast<std::size_t>(operand.bytes),
              sizeof x);
  return x;
}

float ex2(float x) {
  constexpr float kLeast = std::numeric_limits<float>::min();
  const float y = std::exp2(std::fabs(x) < kLeast ? 0 : x);
  return y < kLeast ? 0 : y;
}

float fma_rounded_down(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;
  const auto x = static_cast<float>(exact);
  return x > exact ? std::nextafter(x, -std::numeric_limits<float>::infinity()) : x;
}

/// Out of range: the nearest that there is. A NaN becomes 0.
template <class To, class From>
To to_integer(From x, bool to_even) {
  if (std::isnan(x)) return 0;
  x = to_even ? std::nearbyint(x) : std::trunc(x);
  if (x <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}

float half_to_float(Type type, std::uint16_t bits) {
  if (type == Type::bf16) {
    natten::bfloat16 x;
    x.bits = bits;
    return x;
  }
  natten::float16 x;
  x.bits = bits;
  return x;
}
/// The NaN that cvt makes has all bits of its mantissa.
std::uint16_t float_to_half(bool is_bf16, float x) {
  if (std::isnan(x)) return 0x7fff;
  return is_bf16 ? natten::bfloat16(x).bits : natten::float16(x).bits;
}
/// To nearest, of two that are as near away from zero. The bits that TF32 does not have are zero.
std::uint32_t float_to_tf32(float x) {
  constexpr std::uint32_t kDropped = 0x1fff;
  if (std::isnan(x)) return 0x7fffffff & ~kDropped;
  const std::uint32_t bits = natten::detail::bits_of(x);
  return (std::isinf(x) ? bits : bits + (kDropped + 1) / 2) & ~kDropped;
}

}  // namespace

Warp::Warp(const Entry& entry, int number, SharedMemory& shared, GlobalMemory& global)
    : entry_(entry),
      number_(number),
      shared_(shared),
      global_(global),
      registers_(static_cast<std::size_t>(entry.register_bytes), '\xdb') {
  for (const Entry::Constant& constant : entry.constants) {
    char* lanes = at(constant.operand);
    if (constant.operand.bytes == 0) {
      put(lanes, 0, static_cast<std::uint32_t>(constant.value));
      continue;
    }
    for (int lane = 0; lane < kLanes; ++lane)
      put_extended(lanes, constant.operand.bytes, lane, constant.value);
  }
}

void Warp::begin(std::uint32_t block, const void* parameters) {
  parameters_ = static_cast<const char*>(parameters);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (entry_.thread >= 0) put(registers_.data() + entry_.thread, lane, number_ * kLanes + lane);
    if (entry_.block >= 0) put(registers_.data() + entry_.block, lane, block);
    closed_groups_[lane] = 0;
  }
  live_ = kAllLanes;
  have_parted_ = false;
  place_ = 0;
  is_at_barrier_ = false;
  copies_.clear();
}

std::uint32_t& Warp::predicate(const Operand& operand) {
  return *reinterpret_cast<std::uint32_t*>(at(operand));
}

/// Lanes that may go on together: at the same place, and not waiting for others there.
void Warp::choose(Rng* rng, std::int32_t& place, std::uint32_t& lanes) const {
  std::int32_t choices[kLanes];
  int count = 0;
  for_each_lane(live_, [&](int lane) {
    const std::int32_t here = places_[lane];
    if (is_collective(entry_.code[static_cast<std::size_t>(here)].opcode)) return;
    if (std::find(choices, choices + count, here) == choices + count) choices[count++] = here;
  });
  if (count == 0) throw Fault("lanes of a warp wait for each other at different places");
  place = rng ? choices[(*rng)() % static_cast<std::uint64_t>(count)]
              : *std::min_element(choices, choices + count);
  lanes = 0;
  for_each_lane(live_, [&](int lane) {
    if (places_[lane] == place) lanes |= 1u << lane;
  });
}

void Warp::move_on(std::uint32_t lanes, std::int32_t to) {
  if (lanes == 0) return;
  if (!have_parted_) {
    if (lanes == live_) {
      place_ = to;
      return;
    }
    std::fill(places_, places_ + kLanes, place_);
    have_parted_ = true;
  }
  for_each_lane(lanes, [&](int lane) { places_[lane] = to; });
}

/// Lanes at one place are together.
void Warp::meet() {
  if (!have_parted_ || live_ == 0) return;
  const std::int32_t first = places_[__builtin_ctz(live_)];
  for (std::uint32_t rest = live_; rest != 0; rest &= rest - 1)
    if (places_[__builtin_ctz(rest)] != first) return;
  have_parted_ = false;
  place_ = first;
}

void Warp::step(Rng* rng, std::vector<std::uint64_t>& counts) {
  std::int32_t place = place_;
  std::uint32_t lanes = live_;
  if (have_parted_) choose(rng, place, lanes);
  const Instruction& in = entry_.code[static_cast<std::size_t>(place)];
  line_ = in.line;
  ++counts[static_cast<std::size_t>(place)];
  std::uint32_t active = lanes;
  if (in.is_guarded) {
    const std::uint32_t guard = get<std::uint32_t>(registers_.data() + in.guard, 0);
    active &= in.is_guard_negated ? ~guard : guard;
  }
  if (in.opcode == Opcode::branch) {
    if (active == lanes) {
      move_on(lanes, in.target);
    } else {
      move_on(lanes & ~active, place + 1);
      move_on(active, in.target);
    }
  } else {
    if (in.opcode == Opcode::ret)
      live_ &= ~active;
    else if (active != 0)
      execute(in, active, rng);
    move_on(lanes & live_, place + 1);
  }
  meet();
}

void Warp::execute(const Instruction& in, std::uint32_t lanes, Rng* rng) {
  if (is_collective(in.opcode) && lanes != (in.opcode == Opcode::barrier ? live_ : kAllLanes))
    throw Fault("needs all lanes of a warp, and some are elsewhere");
  switch (in.opcode) {
    case Opcode::nop:
    case Opcode::branch:
    case Opcode::ret: return;
    case Opcode::barrier: is_at_barrier_ = true; return;
    case Opcode::warp_barrier: return shared_.pass_warp_barrier(number_);
    case Opcode::and_:
    case Opcode::or_:
    case Opcode::xor_:
    case Opcode::not_:
    case Opcode::move: return bytes_of(in.type) == 0 ? predicates(in, lanes) : bits(in, lanes);
    case Opcode::bfi:
    case Opcode::funnel_shift:
    case Opcode::shift_left:
    case Opcode::shift_right: return bits(in, lanes);
    case Opcode::mad_wide:
    case Opcode::mul_wide:
    case Opcode::mul_hi: return wide_product(in, lanes);
    case Opcode::set_predicate: return compare(in, lanes);
    case Opcode::select: return select(in, lanes);
    case Opcode::convert: return convert(in, lanes);
    case Opcode::to_generic:
    case Opcode::to_shared: return change_space(in, lanes);
    case Opcode::pack:
    case Opcode::unpack: return pack(in, lanes);
    case Opcode::shuffle:
    case Opcode::shuffle_xor:
    case Opcode::vote_all: return exchange(in, lanes);
    case Opcode::load: return load(in, lanes);
    case Opcode::store: return store(in, lanes);
    case Opcode::atom_add: return add_atomically(in, lanes);
    case Opcode::load_matrices: return load_matrices(in);
    case Opcode::multiply_matrices: return multiply_matrices(in);
    case Opcode::copy_async: return begin_copies(in, lanes, rng);
    case Opcode::copy_commit:
      return for_each_lane(lanes, [&](int lane) { ++closed_groups_[lane]; });
    case Opcode::copy_wait: return end_copies(in, lanes);
    default: return arithmetic(in, lanes);
  }
}

/// Of each lane: the first operand becomes `f` of the others, whose types are `S`.
template <class D, class... S, class F>
void Warp::each(const Instruction& in, std::uint32_t lanes, F&& f) {
  char* const to = at(in.operands[0]);
  const char* from[sizeof...(S)];
  for (std::size_t i = 0; i < sizeof...(S); ++i) from[i] = at(in.operands[i + 1]);
  const auto of_lane = [&](auto... i) {
    for_each_lane(lanes, [&](int lane) {
      put<D>(to, lane, static_cast<D>(f(get<S>(from[decltype(i)::value], lane)...)));
    });
  };
  if constexpr (sizeof...(S) == 1)
    of_lane(std::integral_constant<int, 0>{});
  else if constexpr (sizeof...(S) == 2)
    of_lane(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
  else if constexpr (sizeof...(S) == 3)
    of_lane(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{},
            std::integral_constant<int, 2>{});
  else
    of_lane(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{},
            std::integral_constant<int, 2>{}, std::integral_constant<int, 3>{});
}

void Warp::arithmetic(const Instruction& in, std::uint32_t lanes) {
  if (in.opcode == Opcode::ex2) {
    if (in.type != Type::f32) unknown("ex2");
    return each<float, float>(in, lanes, [](float x) { return ex2(x); });
  }
  if (in.opcode == Opcode::fma && in.rounds_down) {
    if (in.type != Type::f32) unknown("fma.rm");
    return each<float, float, float, float>(in, lanes, fma_rounded_down);
  }
  with_number(in.type, [&](auto type) {
    using T = decltype(type);
    constexpr bool kIsInteger = std::is_integral_v<T>;
    const auto two = [&](auto&& f) { each<T, T, T>(in, lanes, f); };
    const auto three = [&](auto&& f) { each<T, T, T, T>(in, lanes, f); };
    switch (in.opcode) {
      case Opcode::add:
        return two([](T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x + y; }); });
      case Opcode::sub:
        return two([](T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x - y; }); });
      case Opcode::mul:
        return two([](T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x * y; }); });
      case Opcode::mad:
        return three([](T a, T b, T c) {
          return wrapped(wrapped(a, b, [](auto x, auto y) { return x * y; }), c,
                         [](auto x, auto y) { return x + y; });
        });
      case Opcode::min: return two([](T a, T b) { return smaller(a, b); });
      case Opcode::max: return two([](T a, T b) { return larger(a, b); });
      case Opcode::div:
        return two([](T a, T b) {
          if constexpr (kIsInteger)
            if (b == 0) throw Fault("divides by zero");
          return static_cast<T>(a / b);
        });
      case Opcode::neg:
        return each<T, T>(in, lanes, [](T x) {
          if constexpr (kIsInteger)
            return static_cast<T>(0 - static_cast<std::uint64_t>(x));
          else
            return -x;
        });
      case Opcode::abs:
        return each<T, T>(in, lanes, [](T x) {
          if constexpr (kIsInteger)
            return x < 0 ? static_cast<T>(0 - static_cast<std::uint64_t>(x)) : x;
          else
            return std::fabs(x);
        });
      default: break;
    }
    if constexpr (kIsInteger) {
      if (in.opcode != Opcode::rem) unknown("an operation");
      return two([](T a, T b) {
        if (b == 0) throw Fault("divides by zero");
        return static_cast<T>(a % b);
      });
    } else {
      if (in.opcode == Opcode::fma) return three([](T a, T b, T c) { return std::fma(a, b, c); });
      if (in.opcode != Opcode::rcp) unknown("an operation");
      return each<T, T>(in, lanes, [&](T x) {
        T y = 1 / x;
        if constexpr (sizeof(T) == 8)
          if (in.is_approximate) {  // rcp.approx.ftz.f64 gives the upper half of its bits
            std::uint64_t bits;
            std::memcpy(&bits, &y, sizeof bits);
            bits &= ~std::uint64_t{0xffffffff};
            std::memcpy(&y, &bits, sizeof bits);
          }
        return y;
      });
    }
  });
}

void Warp::bits(const Instruction& in, std::uint32_t lanes) {
  if (in.opcode == Opcode::bfi) {
    const auto insert = [&](auto type) {
      using U = decltype(type);
      each<U, U, U, std::uint32_t, std::uint32_t>(
          in, lanes, [](U a, U b, std::uint32_t first, std::uint32_t count) {
            constexpr std::uint32_t kBits = 8 * sizeof(U);
            const U run = count >= kBits ? ~U{0} : (U{1} << count) - 1;
            const U mask = first >= kBits ? U{0} : run << first;
            return (b & ~mask) | (first >= kBits ? U{0} : (a << first) & mask);
          });
    };
    if (in.type == Type::u32) return insert(std::uint32_t{});
    if (in.type == Type::u64) return insert(std::uint64_t{});
    unknown("bfi");
  }
  if (in.opcode == Opcode::funnel_shift) {
    if (in.type != Type::u32) unknown("shf");
    return each<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>(
        in, lanes, [](std::uint32_t low, std::uint32_t high, std::uint32_t by) {
          const std::uint64_t both = std::uint64_t{high} << 32 | low;
          return static_cast<std::uint32_t>(both >> by % 32);
        });
  }
  const bool shifts_sign = in.opcode == Opcode::shift_right;
  if (in.opcode == Opcode::shift_left || shifts_sign)
    return with_integer(in.type, [&](auto type) {
      using T = decltype(type);
      constexpr std::uint32_t kBits = 8 * sizeof(T);
      if (shifts_sign)
        each<T, T, std::uint32_t>(in, lanes, [](T a, std::uint32_t by) {
          return by >= kBits ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> by);
        });
      else
        each<T, T, std::uint32_t>(in, lanes, [](T a, std::uint32_t by) {
          return by >= kBits ? T{0} : static_cast<T>(static_cast<std::uint64_t>(a) << by);
        });
    });
  const auto run = [&](auto type) {
    using T = decltype(type);
    switch (in.opcode) {
      case Opcode::and_: return each<T, T, T>(in, lanes, [](T a, T b) { return a & b; });
      case Opcode::or_: return each<T, T, T>(in, lanes, [](T a, T b) { return a | b; });
      case Opcode::xor_: return each<T, T, T>(in, lanes, [](T a, T b) { return a ^ b; });
      case Opcode::not_: return each<T, T>(in, lanes, [](T a) { return ~a; });
      default: return each<T, T>(in, lanes, [](T a) { return a; });
    }
  };
  switch (bytes_of(in.type)) {
    case 2: return run(std::uint16_t{});
    case 4: return run(std::uint32_t{});
    default: return run(std::uint64_t{});
  }
}

void Warp::predicates(const Instruction& in, std::uint32_t lanes) {
  const std::uint32_t a = predicate(in.operands[1]);
  const std::uint32_t b = in.operand_count > 2 ? predicate(in.operands[2]) : 0;
  const std::uint32_t result = in.opcode == Opcode::and_   ? a & b
                               : in.opcode == Opcode::or_  ? a | b
                               : in.opcode == Opcode::xor_ ? a ^ b
                               : in.opcode == Opcode::not_ ? ~a
                                                           : a;
  std::uint32_t& to = predicate(in.operands[0]);
  to = (to & ~lanes) | (result & lanes);
}

void Warp::wide_product(const Instruction& in, std::uint32_t lanes) {
  const auto run = [&](auto narrow, auto wide) {
    using T = decltype(narrow);
    using W = decltype(wide);
    if (in.opcode == Opcode::mul_hi)
      return each<T, T, T>(in, lanes, [](T a, T b) { return (W{a} * W{b}) >> (8 * sizeof(T)); });
    if (in.opcode == Opcode::mul_wide)
      return each<W, T, T>(in, lanes, [](T a, T b) { return W{a} * W{b}; });
    each<W, T, T, W>(in, lanes, [](T a, T b, W c) {
      return static_cast<W>(static_cast<std::uint64_t>(W{a} * W{b}) +
                            static_cast<std::uint64_t>(c));
    });
  };
  switch (in.type) {
    case Type::u16: return run(std::uint16_t{}, std::uint32_t{});
    case Type::s16: return run(std::int16_t{}, std::int32_t{});
    case Type::u32: return run(std::uint32_t{}, std::uint64_t{});
    case Type::s32: return run(std::int32_t{}, std::int64_t{});
    default: unknown("a wide product");
  }
}

void Warp::compare(const Instruction& in, std::uint32_t lanes) {
  std::uint32_t result = 0;
  with_number(in.type, [&](auto type) {
    using T = decltype(type);
    const char *a = at(in.operands[1]), *b = at(in.operands[2]);
    for_each_lane(lanes, [&](int lane) {
      if (holds(in.comparison, get<T>(a, lane), get<T>(b, lane))) result |= 1u << lane;
    });
  });
  switch (in.combination) {
    case Combination::none: break;
    case Combination::and_: result &= predicate(in.operands[3]); break;
    case Combination::or_: result |= predicate(in.operands[3]); break;
    case Combination::xor_: result ^= predicate(in.operands[3]); break;
  }
  std::uint32_t& to = predicate(in.operands[0]);
  to = (to & ~lanes) | (result & lanes);
}

void Warp::select(const Instruction& in, std::uint32_t lanes) {
  const std::uint32_t chosen = predicate(in.operands[3]);
  char* const to = at(in.operands[0]);
  const char *a = at(in.operands[1]), *b = at(in.operands[2]);
  const auto run = [&](auto type) {
    using T = decltype(type);
    for_each_lane(lanes,
                  [&](int lane) { put(to, lane, get<T>(chosen >> lane & 1 ? a : b, lane)); });
  };
  switch (bytes_of(in.type)) {
    case 2: return run(std::uint16_t{});
    case 4: return run(std::uint32_t{});
    default: return run(std::uint64_t{});
  }
}

void Warp::convert(const Instruction& in, std::uint32_t lanes) {
  const Operand &result = in.operands[0], &first = in.operands[1];
  char* const to = at(result);
  const char* const a = at(first);
  if (in.type == Type::f16x2 || in.type == Type::bf16x2) {
    if (in.from != Type::f32) unknown("cvt");
    const bool is_bf16 = in.type == Type::bf16x2;
    return each<std::uint32_t, float, float>(in, lanes, [&](float high, float low) {
      return std::uint32_t{float_to_half(is_bf16, high)} << 16 | float_to_half(is_bf16, low);
    });
  }
  if (in.type == Type::tf32) {
    if (in.from != Type::f32) unknown("cvt");
    return each<std::uint32_t, float>(in, lanes, float_to_tf32);
  }
  const auto is_half = [](Type type) { return type == Type::f16 || type == Type::bf16; };
  if (is_half(in.from)) {
    if (in.type != Type::f32) unknown("cvt");
    return each<float, std::uint16_t>(in, lanes,
                                      [&](std::uint16_t x) { return half_to_float(in.from, x); });
  }
  if (is_half(in.type)) {
    if (in.from != Type::f32) unknown("cvt");
    return each<std::uint16_t, float>(
        in, lanes, [&](float x) { return float_to_half(in.type == Type::bf16, x); });
  }
  with_number(in.type, [&](auto to_type) {
    using To = decltype(to_type);
    with_number(in.from, [&](auto from_type) {
      using From = decltype(from_type);
      for_each_lane(lanes, [&](int lane) {
        const From x = get_low<From>(first, a, lane);
        if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
          put_extended(to, result.bytes, lane, to_integer<To>(x, in.rounds_to_even));
        } else if constexpr (std::is_floating_point_v<To>) {
          auto y = static_cast<To>(x);
          if (in.is_saturated) y = y > 0 ? std::min(y, To(1)) : To(0);
          put(to, lane, y);
        } else {
          if (in.is_saturated) unknown("cvt.sat");
          put_extended(to, result.bytes, lane, static_cast<To>(x));
        }
      });
    });
  });
}

/// Addresses of global memory are the same in both ways to write them.
void Warp::change_space(const Instruction& in, std::uint32_t lanes) {
  if (in.type != Type::u64) unknown("cvta");
  const std::uint64_t window = in.space == Space::shared ? GlobalMemory::kSharedWindow : 0;
  const bool to_generic = in.opcode == Opcode::to_generic;
  each<std::uint64_t, std::uint64_t>(
      in, lanes, [&](std::uint64_t x) { return to_generic ? x + window : x - window; });
}

/// Two halves of a register, the lower one first, into it or out of it.
void Warp::pack(const Instruction& in, std::uint32_t lanes) {
  const auto run = [&](auto half, auto whole) {
    using H = decltype(half);
    using W = decltype(whole);
    constexpr int kBits = 8 * sizeof(H);
    if (in.opcode == Opcode::pack)
      return each<W, H, H>(in, lanes, [](H low, H high) { return W{high} << kBits | low; });
    char *low = at(in.operands[0]), *high = at(in.operands[1]);
    const char* from = at(in.operands[2]);
    for_each_lane(lanes, [&](int lane) {
      const W x = get<W>(from, lane);
      put(low, lane, static_cast<H>(x));
      put(high, lane, static_cast<H>(x >> kBits));
    });
  };
  if (bytes_of(in.type) == 8) return run(std::uint32_t{}, std::uint64_t{});
  if (bytes_of(in.type) == 4) return run(std::uint16_t{}, std::uint32_t{});
  unknown("mov");
}

void Warp::exchange(const Instruction& in, std::uint32_t lanes) {
  if (in.opcode == Opcode::vote_all) {
    const bool all = (predicate(in.operands[1]) & lanes) == lanes;
    predicate(in.operands[0]) = all ? kAllLanes : 0;
    return;
  }
  // d|p, a, b, c, the lanes that take part; c holds a clamp and, from bit 8, a mask of segments.
  std::uint32_t x[kLanes], found = 0;
  std::memcpy(x, at(in.operands[2]), sizeof x);
  char* const to = at(in.operands[0]);
  const char *by = at(in.operands[3]), *limits = at(in.operands[4]), *who = at(in.operands[5]);
  std::uint32_t results[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (get<std::uint32_t>(who, lane) != kAllLanes) throw Fault("a shuffle of some lanes");
    const std::uint32_t c = get<std::uint32_t>(limits, lane),
                        own = static_cast<std::uint32_t>(lane);
    const std::uint32_t segment = c >> 8 & 31, b = get<std::uint32_t>(by, lane) & 31;
    const std::uint32_t last = (own & segment) | (c & 31 & ~segment);
    std::uint32_t from =
        in.opcode == Opcode::shuffle_xor ? own ^ b : (own & segment) | (b & ~segment);
    if (from <= last)
      found |= 1u << lane;
    else
      from = own;
    results[lane] = x[from];
  }
  std::memcpy(to, results, sizeof results);
  predicate(in.operands[1]) = found;
}

std::uint64_t Warp::address(Space space, const Operand& operand, std::int32_t displacement,
                            int lane) const {
  const char* lanes = registers_.data() + operand.at;
  const std::uint64_t base =
      operand.bytes == 4 ? get<std::uint32_t>(lanes, lane) : get<std::uint64_t>(lanes, lane);
  const auto sum = base + static_cast<std::uint64_t>(std::int64_t{displacement});
  return space == Space::shared ? static_cast<std::uint32_t>(sum) : sum;
}

namespace {

void expect_aligned(std::uint64_t address, int bytes) {
  if (address % static_cast<std::uint64_t>(bytes) != 0)
    throw Fault("accesses " + std::to_string(bytes) + " bytes at an address that is no multiple");
}

}  // namespace

void Warp::load(const Instruction& in, std::uint32_t lanes) {
  const int size = bytes_of(in.type), bytes = size * in.elements;
  for_each_lane(lanes, [&](int lane) {
    std::uint64_t from = address(in.space, in.operands[in.elements], in.displacement, lane);
    Space space = in.space;
    if (space == Space::generic && from >= GlobalMemory::kSharedWindow) {
      space = Space::shared;
      from -= GlobalMemory::kSharedWindow;
    }
    expect_aligned(from, bytes);
    alignas(16) char memory[32];
    const auto count = static_cast<std::size_t>(bytes);
    if (space == Space::shared)
      shared_.read({number_, lane}, static_cast<std::uint32_t>(from), memory, bytes);
    else
      std::memcpy(memory,
                  space == Space::parameter ? parameters_ + from : global_.read(from, count),
                  count);
    for (int i = 0; i < in.elements; ++i) {
      const Operand& to = in.operands[i];
      char* const registers = at(to);
      if (to.bytes == size) {
        std::memcpy(registers + lane * size, memory + i * size, static_cast<std::size_t>(size));
      } else {
        with_integer(in.type, [&](auto type) {
          std::memcpy(&type, memory + i * size, sizeof type);
          put_extended(registers, to.bytes, lane, type);
        });
      }
    }
  });
}

void Warp::store(const Instruction& in, std::uint32_t lanes) {
  const int size = bytes_of(in.type), bytes = size * in.elements;
  for_each_lane(lanes, [&](int lane) {
    std::uint64_t to = address(in.space, in.operands[0], in.displacement, lane);
    Space space = in.space;
    if (space == Space::generic && to >= GlobalMemory::kSharedWindow) {
      space = Space::shared;
      to -= GlobalMemory::kSharedWindow;
    }
    expect_aligned(to, bytes);
    alignas(16) char memory[32];
    for (int i = 0; i < in.elements; ++i) {
      const Operand& from = in.operands[1 + i];
      std::memcpy(memory + i * size, at(from) + lane * from.bytes, static_cast<std::size_t>(size));
    }
    const auto count = static_cast<std::size_t>(bytes);
    if (space == Space::shared)
      shared_.write({number_, lane}, static_cast<std::uint32_t>(to), memory, bytes);
    else
      std::memcpy(global_.write(to, count), memory, count);
  });
}

void Warp::add_atomically(const Instruction& in, std::uint32_t lanes) {
  if (in.type != Type::f32) unknown("atom.add");
  for_each_lane(lanes, [&](int lane) {
    const std::uint64_t address_of_lane = address(in.space, in.operands[1], in.displacement, lane);
    expect_aligned(address_of_lane, 4);
    char* const to = global_.write(address_of_lane, 4);
    const float before = get<float>(to, 0);
    put(to, 0, before + get<float>(at(in.operands[2]), lane));
    put(at(in.operands[0]), lane, before);
  });
}

void Warp::load_matrices(const Instruction& in) {
  std::uint32_t results[4][kLanes];
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint16_t x[8][8];
    for (int i = 0; i < 8; ++i) {
      const int lane = 8 * matrix + i;
      const std::uint64_t from = address(in.space, in.operands[4], in.displacement, lane);
      expect_aligned(from, 16);
      shared_.read({number_, lane}, static_cast<std::uint32_t>(from), x[i], 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const std::uint16_t low = in.is_transposed ? x[j][i] : x[i][j];
      const std::uint16_t high = in.is_transposed ? x[j + 1][i] : x[i][j + 1];
      results[matrix][lane] = low | std::uint32_t{high} << 16;
    }
  }
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(at(in.operands[matrix]), results[matrix], sizeof results[matrix]);
}

/// Matrices lie in registers by PTX's fragment layouts. Products are added one after another.
void Warp::multiply_matrices(const Instruction& in) {
  const int packed = in.type == Type::tf32 ? 1 : 2;  // elements in a register
  const int depth = 8 * packed;
  float a[16][16], b[16][8], c[16][8];
  const auto element = [&](const Operand& operand, int lane, int which) -> float {
    const auto word = get<std::uint32_t>(at(operand), lane);
    if (in.type != Type::tf32)
      return half_to_float(in.type, static_cast<std::uint16_t>(word >> (16 * which)));
    if (word & 0x1fff) throw Fault("multiplies what is not rounded to TF32");
    return natten::detail::float_of(word);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < packed; ++i) {
        const int k = in_group * packed + i;
        a[group + r % 2 * 8][k + r / 2 * depth / 2] = element(in.operands[4 + r], lane, i);
        if (r < 2) b[k + r * depth / 2][group] = element(in.operands[8 + r], lane, i);
      }
      c[group + r / 2 * 8][in_group * 2 + r % 2] = get<float>(at(in.operands[10 + r]), lane);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < 4; ++r)
      put(at(in.operands[r]), lane, c[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
}

void Warp::begin_copies(const Instruction& in, std::uint32_t lanes, Rng* rng) {
  for_each_lane(lanes, [&](int lane) {
    Copy copy{};
    copy.to = static_cast<std::uint32_t>(address(Space::shared, in.operands[0], 0, lane));
    copy.group = closed_groups_[lane];
    copy.bytes = static_cast<std::uint8_t>(in.elements);
    copy.lane = static_cast<std::uint8_t>(lane);
    const std::uint64_t from = address(Space::global, in.operands[1], 0, lane);
    const auto from_memory = get<std::uint32_t>(at(in.operands[2]), lane);
    if (from_memory > copy.bytes) throw Fault("copies more than there is room for");
    copy.from_memory = static_cast<std::uint8_t>(from_memory);
    expect_aligned(from, in.elements);
    expect_aligned(copy.to, in.elements);
    if (from_memory > 0) copy.from = global_.read(from, from_memory);
    const bool lands_now = rng && (*rng)() % 4 == 0;
    shared_.begin_copy({number_, lane}, copy.to, copy.bytes, rng && (*rng)() % 2 == 0);
    if (lands_now) land(copy);
    copies_.push_back(copy);
  });
}

void Warp::land(Copy& copy) {
  char bytes[16] = {};
  if (copy.from_memory > 0) std::memcpy(bytes, copy.from, copy.from_memory);
  shared_.land_copy(copy.to, bytes, copy.bytes);
  copy.has_landed = true;
}

void Warp::land_some_copies(Rng& rng) {
  for (Copy& copy : copies_)
    if (!copy.has_landed && rng() % 4 == 0) land(copy);
}

void Warp::end_copies(const Instruction& in, std::uint32_t lanes) {
  const auto pending = static_cast<std::uint32_t>(in.displacement);
  const auto rest = std::remove_if(copies_.begin(), copies_.end(), [&](Copy& copy) {
    if (!(lanes >> copy.lane & 1) || copy.group + pending >= closed_groups_[copy.lane])
      return false;
    if (!copy.has_landed) land(copy);
    shared_.end_copy({number_, copy.lane}, copy.to, copy.bytes);
    return true;
  });
  copies_.erase(rest, copies_.end());
}

}  // namespace natten_tests::ptx
