// The interpreter of PTX itself, on small kernels.

#include <gtest/gtest.h>
#include <natten/half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cases.h"
#include "block.h"
#include "parser.h"

namespace natten_tests::ptx {
namespace {

/// A kernel `test` whose parameters are addresses, in %rd10 and on.
std::string kernel_of(const std::string& body, int addresses) {
  std::string text =
      ".version 9.0\n.target sm_80\n.extern .shared .align 128 .b8 shared[];\n"
      ".visible .entry test(\n\t.param .align 8 .b8 test_param_0[64]\n)\n{\n"
      "\t.reg .pred \t%p<9>;\n\t.reg .b16 \t%rs<9>;\n\t.reg .b32 \t%r<50>;\n"
      "\t.reg .f32 \t%f<20>;\n\t.reg .b64 \t%rd<30>;\n\t.reg .f64 \t%fd<9>;\n"
      "\tmov.b64 \t%rd29, test_param_0;\n\tmov.u32 \t%r30, %tid.x;\n";
  for (int i = 0; i < addresses; ++i)
    text += "\tld.param.u64 \t%rd" + std::to_string(10 + i) + ", [%rd29+" + std::to_string(8 * i) +
            "];\n";
  return text + body + "\n\tret;\n}\n";
}

/// Arrays and a kernel that is given them.
class Runner {
 public:
  template <class T>
  void add(std::vector<T>& values, bool is_writable = true) {
    addresses_.push_back(memory_.add("array " + std::to_string(addresses_.size()), values.data(),
                                     values.size() * sizeof(T), is_writable));
  }
  void operator()(const std::string& body, int threads = kLanes, int shared_bytes = 0,
                  std::uint64_t seed = 0, std::uint32_t block = 0) {
    module_ = Module();
    module_.add(kernel_of(body, static_cast<int>(addresses_.size())));
    entry_ = module_.find("test");
    Block(*entry_, threads, shared_bytes, memory_, seed).run(block, addresses_.data());
  }
  /// What the fault of a kernel says; empty where it has none under any of some seeds.
  std::string fault(const std::string& body, int threads = kLanes, int shared_bytes = 0) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      try {
        (*this)(body, threads, shared_bytes, seed);
      } catch (const Fault& fault) {
        return fault.what();
      }
    }
    return {};
  }
  const Entry& entry() const { return *entry_; }

 private:
  GlobalMemory memory_;
  Module module_;
  Entry* entry_ = nullptr;
  std::vector<std::uint64_t> addresses_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <class T>
std::string type_name() {
  const std::string bits = std::to_string(8 * sizeof(T));
  if (std::is_floating_point_v<T>) return "f" + bits;
  return (std::is_signed_v<T> ? "s" : "u") + bits;
}
template <class T>
std::string register_name(int number) {
  const char* name = std::is_same_v<T, float>    ? "%f"
                     : std::is_same_v<T, double> ? "%fd"
                     : sizeof(T) == 2            ? "%rs"
                     : sizeof(T) == 4            ? "%r"
                                                 : "%rd";
  return name + std::to_string(number);
}

template <class T>
T draw(natten_tests::Rng& rng) {
  if constexpr (std::is_floating_point_v<T>) {
    return pick<T>(rng, {T(0), T(-0.0), T(1), T(-1), std::numeric_limits<T>::infinity(),
                         -std::numeric_limits<T>::infinity(), T(0.1), T(-3.7), T(2.5), T(12345.678),
                         std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::max()});
  } else {
    if (chance(rng, 0.5)) return static_cast<T>(rng());
    return pick<T>(rng, {T(0), T(1), T(2), static_cast<T>(-1), T(31), T(33), T(100),
                         std::numeric_limits<T>::max(), std::numeric_limits<T>::min()});
  }
}

template <class T>
bool is_same(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (std::isnan(a) && std::isnan(b)) return true;
  return std::memcmp(&a, &b, sizeof a) == 0;
}

/// Runs lines in which $0 is a result, of type D, and $1, $2... random inputs, of types S, for many
/// of these, and compares with `host(inputs)`.
template <class D, class... S, class F>
void expect(std::string lines, F&& host) {
  SCOPED_TRACE(lines);
  constexpr int kThreads = 128;
  natten_tests::Rng rng(base_seed());
  std::tuple<std::vector<S>...> inputs;
  std::vector<D> results(kThreads);
  Runner run;
  std::string body;
  int number = 0;
  const auto address = [&](std::size_t bytes) {
    const std::string i = std::to_string(10 + number);
    body += "mul.wide.u32 %rd28, %r30, " + std::to_string(bytes) + ";\nadd.s64 %rd" + i + ", %rd" +
            i + ", %rd28;\n";
    return "[%rd" + i + "]";
  };
  const auto replace = [&](const std::string& name) {
    const std::string placeholder = "$" + std::to_string(number);
    for (auto at = lines.find(placeholder); at != std::string::npos; at = lines.find(placeholder))
      lines.replace(at, placeholder.size(), name);
  };
  run.add(results);
  const std::string result = address(sizeof(D));
  replace(register_name<D>(0));
  const auto prepare = [&](auto& values) {
    using T = typename std::decay_t<decltype(values)>::value_type;
    for (int i = 0; i < kThreads; ++i) values.push_back(draw<T>(rng));
    run.add(values, false);
    ++number;
    const std::string name = register_name<T>(number);
    const std::string from = address(sizeof(T));
    body += "ld.global." + type_name<T>() + " " + name + ", " + from + ";\n";
    replace(name);
  };
  std::apply([&](auto&... values) { (prepare(values), ...); }, inputs);
  ASSERT_NO_THROW(run(body + lines + "\nst.global." + type_name<D>() + " " + result + ", " +
                          register_name<D>(0) + ";",
                      kThreads));
  for (int i = 0; i < kThreads; ++i) {
    const D expected =
        std::apply([&](auto&... v) { return static_cast<D>(host(v[index(i)]...)); }, inputs);
    std::string of;
    std::apply([&](auto&... v) { ((of += " " + testing::PrintToString(v[index(i)])), ...); },
               inputs);
    ASSERT_TRUE(is_same(results[index(i)], expected))
        << "of" << of << ": got " << results[index(i)] << ", expected " << expected;
  }
}

template <class T>
void expect_arithmetic() {
  using U = std::make_unsigned_t<T>;
  const std::string t = type_name<T>();
  const auto wide = [](T x) { return static_cast<std::uint64_t>(x); };
  expect<T, T, T>("add." + t + " $0, $1, $2;", [&](T a, T b) { return wide(a) + wide(b); });
  expect<T, T, T>("sub." + t + " $0, $1, $2;", [&](T a, T b) { return wide(a) - wide(b); });
  expect<T, T, T>("mul.lo." + t + " $0, $1, $2;", [&](T a, T b) { return wide(a) * wide(b); });
  expect<T, T, T, T>("mad.lo." + t + " $0, $1, $2, $3;",
                     [&](T a, T b, T c) { return wide(a) * wide(b) + wide(c); });
  expect<T, T, T>("min." + t + " $0, $1, $2;", [](T a, T b) { return std::min(a, b); });
  expect<T, T, T>("max." + t + " $0, $1, $2;", [](T a, T b) { return std::max(a, b); });
  // The least number has no quotient by -1, and 0 is no divisor.
  const std::string divisor = type_name<U>();
  const std::string one = "or.b" + divisor.substr(1) + " $2, $2, 1;\nshr." + t + " $1, $1, 1;\n";
  const auto quotient = [](T a, T b) { return std::pair<T, T>(static_cast<T>(a >> 1), b | 1); };
  expect<T, T, T>(one + "div." + t + " $0, $1, $2;", [&](T a, T b) {
    const auto [x, y] = quotient(a, b);
    return x / y;
  });
  expect<T, T, T>(one + "rem." + t + " $0, $1, $2;", [&](T a, T b) {
    const auto [x, y] = quotient(a, b);
    return x % y;
  });
  constexpr std::uint32_t kBits = 8 * sizeof(T);
  expect<T, T, std::uint32_t>("shr." + t + " $0, $1, $2;", [](T a, std::uint32_t by) {
    return by >= kBits ? (a < 0 ? T(-1) : T(0)) : static_cast<T>(a >> by);
  });
  expect<T, T, std::uint32_t>("shl.b" + divisor.substr(1) + " $0, $1, $2;",
                              [](T a, std::uint32_t by) {
                                return by >= kBits ? T(0) : static_cast<T>(static_cast<U>(a) << by);
                              });
  const auto compared = [&](const std::string& name, auto&& f) {
    expect<std::uint32_t, T, T>("setp." + name + "." + t + " %p1, $1, $2;\nselp.b32 $0, 7, 9, %p1;",
                                [&](T a, T b) { return f(a, b) ? 7 : 9; });
  };
  compared("eq", [](T a, T b) { return a == b; });
  compared("ne", [](T a, T b) { return a != b; });
  compared("lt", [](T a, T b) { return a < b; });
  compared("le", [](T a, T b) { return a <= b; });
  compared("gt", [](T a, T b) { return a > b; });
  compared("ge", [](T a, T b) { return a >= b; });
  if constexpr (std::is_signed_v<T>)
    expect<T, T>("neg." + t + " $0, $1;", [&](T a) { return 0 - wide(a); });
}

TEST(PtxInstructions, Integers) {
  expect_arithmetic<std::uint16_t>();
  expect_arithmetic<std::int16_t>();
  expect_arithmetic<std::uint32_t>();
  expect_arithmetic<std::int32_t>();
  expect_arithmetic<std::uint64_t>();
  expect_arithmetic<std::int64_t>();
}

TEST(PtxInstructions, WideProducts) {
  using std::int16_t, std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t;
  expect<uint32_t, uint16_t, uint16_t>("mul.wide.u16 $0, $1, $2;",
                                       [](uint32_t a, uint32_t b) { return a * b; });
  expect<int32_t, int16_t, int16_t>("mul.wide.s16 $0, $1, $2;",
                                    [](int32_t a, int32_t b) { return a * b; });
  expect<uint64_t, uint32_t, uint32_t>("mul.wide.u32 $0, $1, $2;",
                                       [](uint64_t a, uint64_t b) { return a * b; });
  expect<int64_t, int32_t, int32_t>("mul.wide.s32 $0, $1, $2;",
                                    [](int64_t a, int64_t b) { return a * b; });
  expect<uint64_t, uint32_t, uint32_t, uint64_t>(
      "mad.wide.u32 $0, $1, $2, $3;", [](uint64_t a, uint64_t b, uint64_t c) { return a * b + c; });
  expect<int64_t, int32_t, int32_t, int64_t>(
      "mad.wide.s32 $0, $1, $2, $3;", [](int64_t a, int64_t b, int64_t c) {
        return static_cast<uint64_t>(a * b) + static_cast<uint64_t>(c);
      });
  expect<uint32_t, uint32_t, uint32_t>("mul.hi.u32 $0, $1, $2;",
                                       [](uint64_t a, uint64_t b) { return (a * b) >> 32; });
  expect<int32_t, int32_t, int32_t>("mul.hi.s32 $0, $1, $2;",
                                    [](int64_t a, int64_t b) { return (a * b) >> 32; });
}

TEST(PtxInstructions, Bits) {
  using U = std::uint32_t;
  expect<U, U, U>("and.b32 $0, $1, $2;", [](U a, U b) { return a & b; });
  expect<U, U, U>("or.b32 $0, $1, $2;", [](U a, U b) { return a | b; });
  expect<U, U, U>("xor.b32 $0, $1, $2;", [](U a, U b) { return a ^ b; });
  expect<U, U>("not.b32 $0, $1;", [](U a) { return ~a; });
  expect<U, U, U>("bfi.b32 $0, $1, $2, 3, 29;", [](U a, U b) { return (b & 7) | a << 3; });
  expect<U, U, U>("bfi.b32 $0, $1, $2, 4, 8;",
                  [](U a, U b) { return (b & ~0xff0u) | (a & 0xff) << 4; });
  expect<U, U, U>("shf.r.wrap.b32 $0, $1, $2, 48;", [](U a, U b) { return a >> 16 | b << 16; });
  expect<U, U, U, U>("shf.r.wrap.b32 $0, $1, $2, $3;", [](U a, U b, U by) {
    return by % 32 ? a >> by % 32 | b << (32 - by % 32) : a;
  });
  using Long = std::uint64_t;
  expect<Long, Long, Long>("bfi.b64 $0, $1, $2, 32, 32;",
                           [](Long a, Long b) { return (b & 0xffffffff) | a << 32; });
  expect<U, U>("mov.b32 {%rs1, %rs2}, $1;\nmov.b32 $0, {%rs2, %rs1};",
               [](U a) { return a >> 16 | a << 16; });
  expect<std::uint64_t, U, U>("mov.b64 $0, {$1, $2};",
                              [](std::uint64_t a, std::uint64_t b) { return a | b << 32; });
  expect<U, U, U>(
      "setp.lt.u32 %p1, $1, $2;\nsetp.eq.u32 %p2, $1, 1;\nnot.pred %p3, %p1;\n"
      "or.pred %p4, %p3, %p2;\nxor.pred %p5, %p4, %p1;\nand.pred %p6, %p5, %p4;\n"
      "selp.b32 $0, 1, 0, %p6;",
      [](U a, U b) {
        const bool p1 = a < b, p4 = !p1 || a == 1;
        return (p4 != p1) && p4 ? 1 : 0;
      });
  expect<U, U, U>(
      "setp.lt.u32 %p1, $1, 5;\nsetp.gt.and.u32 %p2, $2, 7, %p1;\n"
      "selp.b32 $0, 1, 0, %p2;",
      [](U a, U b) { return a < 5 && b > 7 ? 1 : 0; });
}

TEST(PtxInstructions, Numbers) {
  using F = float;
  expect<F, F, F>("add.f32 $0, $1, $2;", [](F a, F b) { return a + b; });
  expect<F, F, F>("sub.f32 $0, $1, $2;", [](F a, F b) { return a - b; });
  expect<F, F, F>("mul.f32 $0, $1, $2;", [](F a, F b) { return a * b; });
  expect<F, F, F>("div.rn.f32 $0, $1, $2;", [](F a, F b) { return a / b; });
  expect<F, F, F, F>("fma.rn.f32 $0, $1, $2, $3;", [](F a, F b, F c) { return std::fma(a, b, c); });
  expect<double, double, double, double>(
      "fma.rn.f64 $0, $1, $2, $3;", [](double a, double b, double c) { return std::fma(a, b, c); });
  expect<F, F>("neg.f32 $0, $1;", [](F a) { return -a; });
  expect<F, F>("abs.f32 $0, $1;", [](F a) { return std::fabs(a); });
  expect<F, F>("ex2.approx.ftz.f32 $0, $1;", [](F a) { return std::exp2(a); });
  // A NaN loses, and -0 is less than 0.
  const auto less = [](F a, F b) { return a < b || (a == b && std::signbit(a) > std::signbit(b)); };
  expect<F, F, F>("max.f32 $0, $1, $2;", [&](F a, F b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : less(a, b) ? b : a;
  });
  expect<F, F, F>("min.f32 $0, $1, $2;", [&](F a, F b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : less(a, b) ? a : b;
  });
  expect<std::uint32_t, F, F>("setp.ne.f32 %p1, $1, $2;\nselp.b32 $0, 1, 0, %p1;", [](F a, F b) {
    return a != b && !std::isnan(a) && !std::isnan(b) ? 1 : 0;
  });
  expect<std::uint32_t, F, F>("setp.leu.f32 %p1, $1, $2;\nselp.b32 $0, 1, 0, %p1;",
                              [](F a, F b) { return !(a > b) ? 1 : 0; });
}

TEST(PtxInstructions, Conversions) {
  using std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t;
  expect<int64_t, int32_t>("cvt.s64.s32 $0, $1;", [](int32_t x) { return x; });
  expect<uint64_t, uint32_t>("cvt.u64.u32 $0, $1;", [](uint32_t x) { return x; });
  expect<uint32_t, uint64_t>("cvt.u32.u64 $0, $1;", [](uint64_t x) { return x; });
  expect<uint32_t, uint16_t>("cvt.u32.u16 $0, $1;", [](uint16_t x) { return x; });
  expect<int32_t, uint32_t>("cvt.s32.s8 $0, $1;",
                            [](uint32_t x) { return static_cast<std::int8_t>(x); });
  expect<float, int32_t>("cvt.rn.f32.s32 $0, $1;", [](int32_t x) { return x; });
  expect<float, float>("cvt.sat.f32.f32 $0, $1;",
                       [](float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; });
  expect<int32_t, float>("cvt.rzi.s32.f32 $0, $1;", [](float x) -> int32_t {
    if (std::isnan(x)) return 0;
    const double bounded = std::min(std::max<double>(x, -2147483648.), 2147483647.);
    return static_cast<int32_t>(bounded);
  });
  expect<double, float>("cvt.f64.f32 $0, $1;", [](float x) { return x; });
  expect<uint32_t, float, float>("cvt.rn.f16x2.f32 $0, $1, $2;", [](float high, float low) {
    const auto bits = [](float x) { return std::isnan(x) ? 0x7fffu : natten::float16(x).bits; };
    return bits(high) << 16 | bits(low);
  });
  expect<uint32_t, float, float>("cvt.rn.bf16x2.f32 $0, $1, $2;", [](float high, float low) {
    const auto bits = [](float x) { return std::isnan(x) ? 0x7fffu : natten::bfloat16(x).bits; };
    return bits(high) << 16 | bits(low);
  });
  expect<uint32_t, float>("cvt.rna.tf32.f32 $0, $1;", [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7fffe000;
    if (std::isinf(x) || x == 0) return natten::detail::bits_of(x);
    const double unit = std::ldexp(1., std::max(std::ilogb(x), -126) - 10);
    return natten::detail::bits_of(static_cast<float>(std::round(x / unit) * unit));
  });
  expect<float, uint16_t>("cvt.f32.f16 $0, $1;", [](uint16_t bits) -> float {
    natten::float16 x;
    x.bits = bits;
    return x;
  });
}

/// Lanes count down from their own numbers, and meet again.
TEST(PtxWarps, PartedLanesMeetAgain) {
  std::vector<std::uint32_t> out(64, 0);
  Runner run;
  run.add(out);
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    ASSERT_NO_THROW(
        run("\tmov.u32 %r1, %r30;\n\tmov.u32 %r2, 0;\n"
            "again:\n\tsetp.eq.u32 %p1, %r1, 0;\n\t@%p1 bra done;\n"
            "\tadd.s32 %r2, %r2, %r1;\n\tadd.s32 %r1, %r1, -1;\n\tbra.uni again;\n"
            "done:\n\tmov.u32 %r5, 1;\n\tmov.u32 %r6, 31;\n\tmov.u32 %r7, -1;\n"
            "\tshfl.sync.bfly.b32 %r3|%p2, %r2, %r5, %r6, %r7;\n"
            "\tmul.wide.u32 %rd1, %r30, 4;\n\tadd.s64 %rd2, %rd10, %rd1;\n"
            "\tst.global.u32 [%rd2], %r3;",
            64, 0, seed));
    for (std::uint32_t i = 0; i < 64; ++i) {
      const std::uint32_t from = i ^ 1;
      ASSERT_EQ(out[i], from * (from + 1) / 2) << "lane " << i << ", seed " << seed;
    }
  }
}

TEST(PtxWarps, LanesThatWaitForEachOtherAreFound) {
  Runner run;
  const std::string text = run.fault(
      "\tsetp.lt.u32 %p1, %r30, 7;\n\t@%p1 bra there;\n\tbar.warp.sync -1;\n\tbra.uni done;\n"
      "there:\n\tbar.warp.sync -1;\ndone:");
  EXPECT_TRUE(contains(text, "wait for each other at different places")) << text;
  EXPECT_TRUE(contains(run.fault("\tsetp.lt.u32 %p1, %r30, 7;\n\t@%p1 bar.warp.sync -1;"),
                       "needs all lanes of a warp"));
}

TEST(PtxWarps, ShufflesAndVotes) {
  std::vector<std::uint32_t> out(32), votes(32);
  Runner run;
  run.add(out);
  run.add(votes);
  ASSERT_NO_THROW(
      run("\tmov.u32 %r5, 31;\n\tmov.u32 %r6, -1;\n\tsub.s32 %r7, %r5, %r30;\n"
          "\tshfl.sync.idx.b32 %r3|%p2, %r30, %r7, %r5, %r6;\n"
          "\tsetp.lt.u32 %p3, %r30, 32;\n\tvote.sync.all.pred %p4, %p3, %r6;\n"
          "\tsetp.lt.u32 %p5, %r30, 31;\n\tvote.sync.all.pred %p6, %p5, %r6;\n"
          "\tselp.b32 %r8, 2, 0, %p4;\n\tselp.b32 %r9, 1, 0, %p6;\n"
          "\tadd.s32 %r8, %r8, %r9;\n"
          "\tmul.wide.u32 %rd1, %r30, 4;\n\tadd.s64 %rd2, %rd10, %rd1;\n"
          "\tst.global.u32 [%rd2], %r3;\n\tadd.s64 %rd2, %rd11, %rd1;\n"
          "\tst.global.u32 [%rd2], %r8;"));
  for (std::uint32_t i = 0; i < 32; ++i) {
    EXPECT_EQ(out[i], 31 - i);
    EXPECT_EQ(votes[i], 2u);
  }
}

/// Threads of 64 write their numbers, and read those of threads so far away.
std::string exchange(const std::string& barrier, int distance) {
  return "\tshl.b32 %r1, %r30, 2;\n\tst.shared.u32 [%r1], %r30;\n" + barrier +
         "\txor.b32 %r2, %r30, " + std::to_string(distance) +
         ";\n\tshl.b32 %r2, %r2, 2;\n\tld.shared.u32 %r3, [%r2];\n"
         "\tmul.wide.u32 %rd1, %r30, 4;\n\tadd.s64 %rd2, %rd10, %rd1;\n"
         "\tst.global.u32 [%rd2], %r3;\n";
}

TEST(PtxRaces, MissingBarriersAreFound) {
  std::vector<std::uint32_t> out(64);
  Runner run;
  run.add(out);
  const auto fault = [&](const std::string& body) { return run.fault(body, 64, 256); };
  const std::string block = "\tbar.sync 0;\n", warp = "\tbar.warp.sync -1;\n";
  EXPECT_EQ(fault(exchange(block, 32)), "");
  for (std::uint32_t i = 0; i < 64; ++i) EXPECT_EQ(out[i], i ^ 32);
  EXPECT_EQ(fault(exchange(block, 1)), "");
  EXPECT_EQ(fault(exchange(warp, 1)), "");
  EXPECT_EQ(fault(exchange("", 0)), "");  // its own
  for (const std::string& body : {exchange(warp, 32), exchange("", 32), exchange("", 1)}) {
    const std::string text = fault(body);
    EXPECT_TRUE(contains(text, "a race in shared memory")) << text;
  }
  // A shuffle brings lanes together, but is no barrier of memory.
  EXPECT_TRUE(contains(fault(exchange("\tmov.u32 %r6, 31;\n\tmov.u32 %r7, -1;\n"
                                      "\tshfl.sync.bfly.b32 %r8|%p1, %r30, 1, %r6, %r7;\n",
                                      1)),
                       "a race"));
}

TEST(PtxRaces, WritesThatCollideAreFound) {
  Runner run;
  const auto fault = [&](const std::string& body) { return run.fault(body, 64, 256); };
  EXPECT_TRUE(contains(fault("\tst.shared.u32 [shared], %r30;"), "writes what was written by"));
  EXPECT_EQ(fault("\tmov.u32 %r1, 5;\n\tst.shared.u32 [shared], %r1;"), "");  // equal values
  const std::string read_all = "\tld.shared.u32 %r2, [shared];\n",
                    write_one =
                        "\tsetp.eq.u32 %p1, %r30, 40;\n\t@%p1 st.shared.u32 [shared], %r30;";
  EXPECT_TRUE(contains(fault(read_all + write_one), "writes what was read by"));
  EXPECT_EQ(fault(read_all + "\tbar.sync 0;\n" + write_one), "");
  EXPECT_TRUE(contains(fault(read_all + "\tbar.warp.sync -1;\n" + write_one),
                       "writes what was read by warp 0"));
}

/// Each of 64 threads copies 16 bytes and reads them, or those of another.
std::string copied(const std::string& wait, const std::string& barrier, int distance) {
  return "\tshl.b32 %r1, %r30, 4;\n\tmul.wide.u32 %rd1, %r30, 16;\n\tadd.s64 %rd2, %rd10, %rd1;\n"
         "\tcp.async.cg.shared.global [%r1], [%rd2], 16;\n\tcp.async.commit_group;\n" +
         wait + barrier + "\txor.b32 %r2, %r1, " + std::to_string(16 * distance) +
         ";\n\tld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r2];\n\tadd.s64 %rd3, %rd11, %rd1;\n"
         "\tst.global.v4.u32 [%rd3], {%r3, %r4, %r5, %r6};";
}

TEST(PtxCopies, AreThereAfterTheWaitAndTheBarrier) {
  std::vector<std::uint32_t> from(256), to(256);
  std::iota(from.begin(), from.end(), 1000);
  Runner run;
  run.add(from, false);
  run.add(to);
  const auto fault = [&](const std::string& body) { return run.fault(body, 64, 1024); };
  const std::string wait = "\tcp.async.wait_group 0;\n", barrier = "\tbar.sync 0;\n";
  EXPECT_EQ(fault(copied(wait, "", 0)), "");
  EXPECT_EQ(to, from);
  EXPECT_EQ(fault(copied(wait, barrier, 32)), "");
  for (std::size_t i = 0; i < 256; ++i) EXPECT_EQ(to[i], from[i ^ 128]);
  EXPECT_TRUE(contains(fault(copied("", barrier, 32)), "has not been waited for"));
  EXPECT_TRUE(contains(fault(copied("", "", 0)), "has not been waited for"));
  EXPECT_TRUE(contains(fault(copied("\tcp.async.wait_group 1;\n", barrier, 32)),
                       "has not been waited for"));
  EXPECT_TRUE(contains(fault(copied(wait, "", 32)), "a race in shared memory"));
  // A second copy to the same place.
  EXPECT_TRUE(contains(fault("\tshl.b32 %r1, %r30, 4;\n"
                             "\tcp.async.cg.shared.global [%r1], [%rd10], 16;\n"
                             "\tcp.async.cg.shared.global [%r1], [%rd10], 16;\n"),
                       "has not been waited for"));
}

TEST(PtxCopies, OfFewerBytesLeaveZeros) {
  std::vector<std::uint32_t> from{11}, to(2, 7);
  Runner run;
  run.add(from, false);
  run.add(to);
  // The second one reads nothing, from wherever it is.
  ASSERT_NO_THROW(
      run("\tsetp.ne.u32 %p1, %r30, 0;\n\t@%p1 bra done;\n\tmov.u32 %r1, 0;\n"
          "\tmov.u32 %r2, 4;\n\tmov.u32 %r3, 4;\n\tmov.u64 %rd1, 64;\n"
          "\tcp.async.ca.shared.global [%r1], [%rd10], 4, %r3;\n"
          "\tcp.async.ca.shared.global [%r2], [%rd1], 4, %r1;\n"
          "\tcp.async.commit_group;\n\tcp.async.wait_group 0;\n"
          "\tld.shared.v2.u32 {%r4, %r5}, [shared];\n"
          "\tst.global.u32 [%rd11], %r4;\n\tst.global.u32 [%rd11+4], %r5;\ndone:",
          kLanes, 8));
  EXPECT_EQ(to, (std::vector<std::uint32_t>{11, 0}));
}

TEST(PtxMemory, StrayAccessesAreFound) {
  std::vector<std::uint32_t> in(32, 1), out(32);
  Runner run;
  run.add(in, false);
  run.add(out);
  const auto fault = [&](const std::string& body) { return run.fault(body, kLanes, 64); };
  EXPECT_EQ(fault("\tld.global.u32 %r1, [%rd10+124];\n\tst.global.u32 [%rd11+124], %r1;"), "");
  const std::string past = fault("\tadd.s32 %r1, %r1, 1;\n\tld.global.u32 %r1, [%rd10+128];");
  EXPECT_TRUE(contains(past, "test, PTX line 19, block 0, warp 0: reads 4 bytes at global address"))
      << past;
  EXPECT_TRUE(contains(past, "byte 128 of array 0, which has 128")) << past;
  EXPECT_TRUE(contains(fault("\tld.global.u32 %r1, [%rd10+-4];"), "byte -4 of array 0"));
  EXPECT_TRUE(contains(fault("\tld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd10+128];"), "byte 128"));
  EXPECT_TRUE(contains(fault("\tst.global.u32 [%rd10], %r30;"), "is only read"));
  EXPECT_TRUE(contains(fault("\tst.global.u32 [%rd11+4096], %r30;"), "byte 4096 of array 1"));
  EXPECT_TRUE(
      contains(fault("\tmov.u64 %rd1, 64;\n\tld.global.u32 %r1, [%rd1];"), "no memory is near it"));
  EXPECT_TRUE(contains(fault("\tld.global.u32 %r1, [%rd10+2];"), "no multiple"));
  EXPECT_TRUE(contains(fault("\tatom.global.add.f32 %f1, [%rd11+128], %f2;"), "byte 128"));
  EXPECT_TRUE(contains(fault("\tmov.u32 %r1, 0;\n"
                             "\tcp.async.cg.shared.global [%r1], [%rd10+128], 16;"),
                       "its operands are not known"));
  EXPECT_TRUE(contains(fault("\tmov.u32 %r1, 0;\n\tadd.s64 %rd1, %rd10, 128;\n"
                             "\tcp.async.cg.shared.global [%r1], [%rd1], 16;"),
                       "byte 128 of array 0"));
  EXPECT_TRUE(contains(fault("\tld.shared.u32 %r1, [shared+64];"), "shared memory, which has 64"));
  EXPECT_TRUE(contains(fault("\tst.shared.u32 [shared+62], %r30;"), "no multiple"));
}

TEST(PtxMemory, NarrowElementsAndGenericAddresses) {
  std::vector<std::int8_t> in{-5, 5, -7, 7};
  std::vector<std::uint32_t> out(4);
  Runner run;
  run.add(in, false);
  run.add(out);
  ASSERT_NO_THROW(
      run("\tsetp.ne.u32 %p1, %r30, 0;\n\t@%p1 bra done;\n"
          "\tld.global.s8 %r1, [%rd10];\n\tld.global.u8 %rs1, [%rd10+2];\n"
          "\tcvt.u32.u16 %r2, %rs1;\n\tst.shared.u8 [shared+3], %rs1;\n"
          "\tld.shared.u8 %r3, [shared+3];\n\tmov.u64 %rd1, shared;\n"
          "\tcvta.shared.u64 %rd2, %rd1;\n\tld.s8 %r4, [%rd2+3];\n"
          "\tst.global.v4.u32 [%rd11], {%r1, %r2, %r3, %r4};\ndone:",
          kLanes, 16));
  const auto bits = [](int x) { return static_cast<std::uint32_t>(x); };
  EXPECT_EQ(out, (std::vector<std::uint32_t>{bits(-5), 249, 249, bits(-7)}));
}

/// Matrices in the elements that a warp copies, by ldmatrix and mma, against their product.
TEST(PtxMatrices, ProductsOfHalves) {
  natten_tests::Rng rng(base_seed());
  for (const bool is_bf16 : {false, true}) {
    std::vector<std::uint16_t> a(16 * 16), b(16 * 8);  // row-major; B's rows are those of k
    std::vector<float> values_a, values_b, c(16 * 8), result(16 * 8);
    const auto fill = [&](std::vector<std::uint16_t>& bits, std::vector<float>& values) {
      for (std::uint16_t& x : bits) {
        const float value = static_cast<float>(uniform(rng, -8, 8)) / 4;
        x = is_bf16 ? natten::bfloat16(value).bits : natten::float16(value).bits;
        values.push_back(value);
      }
    };
    fill(a, values_a);
    fill(b, values_b);
    for (float& x : c) x = static_cast<float>(uniform(rng, -8, 8));
    // Lane i brings 16 bytes: row i % 16, half i / 16 of A; B lies after it, in rows of 16 bytes.
    Runner run;
    run.add(a, false);
    run.add(b, false);
    run.add(c, false);
    run.add(result);
    const std::string type = is_bf16 ? "bf16" : "f16";
    ASSERT_NO_THROW(run(
        "\tand.b32 %r1, %r30, 15;\n\tshr.u32 %r2, %r30, 4;\n\tshl.b32 %r3, %r1, 5;\n"
        "\tshl.b32 %r4, %r2, 4;\n\tadd.s32 %r5, %r3, %r4;\n\tcvt.u64.u32 %rd1, %r5;\n"
        "\tadd.s64 %rd2, %rd10, %rd1;\n\tcp.async.cg.shared.global [%r5], [%rd2], 16;\n"
        "\tshl.b32 %r6, %r1, 4;\n\tcvt.u64.u32 %rd3, %r6;\n\tadd.s64 %rd4, %rd11, %rd3;\n"
        "\tadd.s32 %r7, %r6, 512;\n\tsetp.ne.u32 %p1, %r2, 0;\n\t@%p1 bra waits;\n"
        "\tcp.async.cg.shared.global [%r7], [%rd4], 16;\nwaits:\n"
        "\tcp.async.commit_group;\n\tcp.async.wait_group 0;\n\tbar.warp.sync -1;\n"
        "\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];\n"
        "\tldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r14, %r15, %r16, %r17}, [%r7];\n"
        // C's elements: rows lane / 4 and 8 more, columns 2 * (lane % 4) and the next.
        "\tshr.u32 %r20, %r30, 2;\n\tand.b32 %r21, %r30, 3;\n\tshl.b32 %r22, %r20, 5;\n"
        "\tshl.b32 %r23, %r21, 3;\n\tadd.s32 %r24, %r22, %r23;\n\tcvt.u64.u32 %rd5, %r24;\n"
        "\tadd.s64 %rd6, %rd12, %rd5;\n\tadd.s64 %rd7, %rd13, %rd5;\n"
        "\tld.global.v2.f32 {%f0, %f1}, [%rd6];\n\tld.global.v2.f32 {%f2, %f3}, [%rd6+256];\n"
        "\tmma.sync.aligned.m16n8k16.row.col.f32." +
            type + "." + type +
            ".f32 "
            "{%f4, %f5, %f6, %f7}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f1, %f2, %f3};\n"
            "\tst.global.v2.f32 [%rd7], {%f4, %f5};\n\tst.global.v2.f32 [%rd7+256], {%f6, %f7};",
        kLanes, 1024, 3));
    for (std::size_t row = 0; row < 16; ++row)
      for (std::size_t column = 0; column < 8; ++column) {
        float sum = c[row * 8 + column];
        for (std::size_t k = 0; k < 16; ++k)
          sum += values_a[row * 16 + k] * values_b[k * 8 + column];
        ASSERT_EQ(result[row * 8 + column], sum) << type << " " << row << " " << column;
      }
  }
}

TEST(PtxCounts, AreThoseOfWarps) {
  Runner run;
  run("\tmov.u32 %r1, 3;\nagain:\n\tadd.s32 %r1, %r1, -1;\n\tsetp.ne.s32 %p1, %r1, 0;\n"
      "\t@%p1 bra again;",
      64);
  std::uint64_t adds = 0, all = 0;
  for (std::size_t i = 0; i < run.entry().code.size(); ++i) {
    all += run.entry().counts[i];
    if (run.entry().code[i].opcode == Opcode::add) adds += run.entry().counts[i];
  }
  EXPECT_EQ(adds, 6u);
  EXPECT_EQ(all, 2u * (2 + 1 + 3 * 3 + 1));  // two moves before it, and the end
}

TEST(PtxParser, SaysWhatItDoesNotKnow) {
  Runner run;
  EXPECT_TRUE(contains(run.fault("\tprmt.b32 %r1, %r2, %r3, 5;"),
                       "test, PTX line 16 (prmt.b32 %r1, %r2, %r3, 5;): prmt is not known"));
  EXPECT_TRUE(contains(run.fault("\tadd.cc.s32 %r1, %r2, %r3;"), ".cc is not known"));
  EXPECT_TRUE(contains(run.fault("\tadd.s32 %r1, %r2, %rd3;"), "%rd3 has 8 bytes, not 4"));
  EXPECT_TRUE(contains(run.fault("\tadd.s32 %r1, %r2;"), "has 2 operands, not 3"));
  EXPECT_TRUE(contains(run.fault("\tadd.s32 %x1, %r2, %r3;"), "the register %x1 is not known"));
  EXPECT_TRUE(contains(run.fault("\tbra nowhere;"), "no label nowhere"));
}

}  // namespace
}  // namespace natten_tests::ptx
