#pragma once

// What kernels may ask of the machine that runs them. A kernel is a plain struct, its fields the
// arguments:
//
//   struct Kernel {
//     static constexpr int kThreads = 128;  // of a block
//     static constexpr int kBlocks = 2;     // per multiprocessor, which limits registers
//     template <class Machine>
//     NATTEN_DEVICE void operator()(Machine& gpu) const;
//   };
//
// and a launcher runs it, `launcher(kernel, blocks, shared_bytes)`: `Launcher` (launch.h) on a GPU,
// the emulator of the C++ tests on the host. Kernels of either kind are the same code.

#include <natten/half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define NATTEN_DEVICE __device__ __forceinline__
#else
#define NATTEN_DEVICE inline
#endif
// Host compilers, nvcc's too, know no such pragmas.
#if defined(__CUDA_ARCH__)
#define NATTEN_UNROLL _Pragma("unroll")
#define NATTEN_DO_NOT_UNROLL _Pragma("unroll 1")
#else
#define NATTEN_UNROLL
#define NATTEN_DO_NOT_UNROLL
#endif
/// An unrolled loop with i = 0 ... count - 1, often over elements that registers hold.
// NOLINTNEXTLINE(bugprone-macro-parentheses): i is a name
#define NATTEN_EACH(i, count) NATTEN_UNROLL for (int i = 0; i < (count); ++i)

namespace natten::detail::cuda {

/// Shared memory, in bytes: the most that a block may have on any device since compute capability
/// 8.0, which is that of 8.6, 8.9 and 12.0; what a block takes beside what it asks for; and what a
/// multiprocessor of compute capability 9.0 and 10.0 has, where nothing is known of a device.
inline constexpr int kMostSharedBytes = 99 * 1024;
inline constexpr int kReservedSharedBytes = 1024;
inline constexpr int kSharedBytesOfLargest = 228 * 1024;

/// What a thread of a warp holds of a matrix of 16 x 16 (A), 16 x 8 (B) or 16 x 8 (C) elements of
/// mma.m16n8k16, by PTX's fragment layouts; of mma.m16n8k8 for float, whose A is 16 x 8 and B 8
/// x 8.
using FragmentA = std::uint32_t[4];
using FragmentB = std::uint32_t[2];
using FragmentC = float[4];

/// The bits that float has and TF32 has not.
inline constexpr std::uint32_t kTf32Dropped = (1u << 13) - 1;
/// An operand of products in TF32: rounded to nearest, and the middle between two away from zero.
/// On a device nothing is said of the bits that products take no notice of.
NATTEN_DEVICE std::uint32_t tf32_bits(float x) {
  std::uint32_t bits;
#if defined(__CUDA_ARCH__)
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  bits = natten::detail::bits_of(x);
  if (std::fabs(x) < __builtin_huge_valf()) bits += (kTf32Dropped + 1) / 2;
  bits &= ~kTf32Dropped;
#endif
  return bits;
}
NATTEN_DEVICE float round_to_tf32(float x) {
  return natten::detail::float_of(tf32_bits(x) & ~kTf32Dropped);
}

#if defined(__CUDACC__)

/// One thread of a CUDA device.
class Gpu {
 public:
  __device__ std::int64_t block() const { return blockIdx.x; }
  __device__ int thread() const { return threadIdx.x; }
  /// Shared memory of the block from an offset in bytes. Offset 0 is aligned to 128 bytes.
  template <class E>
  __device__ E* shared(int offset) const {
    return reinterpret_cast<E*>(memory() + offset);
  }
  /// `x`, such that what depends on it is not computed ahead of a loop: that would take registers.
  __device__ int opaque(int x) const {
    asm volatile("" : "+r"(x));
    return x;
  }
  /// The same of an address: else compilers add parts of it anew for each of several from it on.
  template <class E>
  __device__ E* opaque(E* x) const {
    asm volatile("" : "+l"(x));
    return x;
  }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  /// `x` of the thread whose lane number differs in the bits of `mask`.
  __device__ float shuffle_xor(float x, int mask) const {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  /// `x` of a lane of the warp.
  __device__ std::uint32_t shuffle(std::uint32_t x, int lane) const {
    return __shfl_sync(0xffffffffu, x, lane);
  }
  /// Whether `x` holds for all threads of the warp.
  __device__ bool all(bool x) const { return __all_sync(0xffffffffu, x); }

  /// Copies 16 bytes to an offset in shared memory; done after `wait`.
  __device__ void copy_async(int to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from)
                 : "memory");
  }
  /// The same of 16, 8 or 4 bytes, at multiples of as many, of which only the first `given` are
  /// read. The others become zeros.
  template <int kBytes>
  __device__ void copy_async(int to, const void* from, int given) const {
    if constexpr (kBytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from),
                   "r"(given)
                   : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(to)), "l"(from),
                   "n"(kBytes), "r"(given)
                   : "memory");
  }
  /// Closes a group of copies.
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  /// Waits until at most `kPending` of this thread's newest groups are unfinished.
  template <int kPending>
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  /// Loads four matrices of 8 x 8 16-bit elements; thread i gives the offset
  /// in shared memory of row i % 8 of matrix i / 8.
  __device__ void load_matrices(std::uint32_t (&r)[4], int row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row))
                 : "memory");
  }
  __device__ void load_matrices_transposed(std::uint32_t (&r)[4], int row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row))
                 : "memory");
  }
  /// Reads, or writes, 16 bytes at an offset in shared memory.
  __device__ void read_chunk(std::uint32_t (&r)[4], int from) const {
    const uint4 x = *shared<uint4>(from);
    r[0] = x.x;
    r[1] = x.y;
    r[2] = x.z;
    r[3] = x.w;
  }
  __device__ void write_chunk(int to, const std::uint32_t (&r)[4]) const {
    *shared<uint4>(to) = make_uint4(r[0], r[1], r[2], r[3]);
  }
  /// The 32 bits from bit `shift` on, less than 32, of two words, of which `low` comes first.
  __device__ std::uint32_t funnel(std::uint32_t low, std::uint32_t high, int shift) const {
    return __funnelshift_r(low, high, shift);
  }
  /// c += a b. `T` is the type of a's and b's elements; float stands for TF32, to which they must
  /// have been rounded.
  template <class T>
  __device__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) const;
  /// c = a b.
  template <class T>
  __device__ void multiply(FragmentC& c, const FragmentA& a, const FragmentB& b) const;

  /// Two elements in one register, the first in the lower half.
  template <class T>
  __device__ std::uint32_t pack(float first, float second) const;

  __device__ float exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ float log(float x) const { return logf(x); }
  /// Copies 16, 8 or 4 bytes, at multiples of as many.
  template <int kBytes>
  __device__ void copy(void* to, const void* from) const {
    using Piece = std::conditional_t<kBytes == 16, uint4,
                                     std::conditional_t<kBytes == 8, uint2, std::uint32_t>>;
    static_assert(sizeof(Piece) == kBytes);
    *static_cast<Piece*>(to) = *static_cast<const Piece*>(from);
  }
  __device__ void atomic_add(float* to, float x) const { atomicAdd(to, x); }

 private:
  static __device__ char* memory() {
    extern __shared__ __align__(128) char natten_shared[];
    return natten_shared;
  }
  static __device__ std::uint32_t address(int offset) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory())) + offset;
  }
};

#define NATTEN_MULTIPLY_ADD(T, variant)                                                          \
  template <>                                                                                    \
  __device__ inline void Gpu::multiply_add<T>(FragmentC & c, const FragmentA& a,                 \
                                              const FragmentB& b) const {                        \
    asm("mma.sync.aligned." variant                                                              \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }                                                                                              \
  template <>                                                                                    \
  __device__ inline void Gpu::multiply<T>(FragmentC & c, const FragmentA& a, const FragmentB& b) \
      const {                                                                                    \
    asm("mma.sync.aligned." variant                                                              \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"                   \
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));          \
  }
NATTEN_MULTIPLY_ADD(float16, "m16n8k16.row.col.f32.f16.f16.f32")
NATTEN_MULTIPLY_ADD(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
NATTEN_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef NATTEN_MULTIPLY_ADD

template <>
__device__ inline std::uint32_t Gpu::pack<float16>(float first, float second) const {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
template <>
__device__ inline std::uint32_t Gpu::pack<bfloat16>(float first, float second) const {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

#endif  // __CUDACC__

}  // namespace natten::detail::cuda
