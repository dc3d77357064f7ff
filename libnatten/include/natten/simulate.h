#pragma once

#include <natten/export.h>
#include <natten/problem.h>

#include <cstdint>
#include <string>
#include <vector>

namespace natten {

/// What one pass of the kernels does for a call, over all of its batch and heads. "Columns" are
/// what rows gather from: keys for queries, or queries for keys.
struct PassWork {
  std::string name;
  std::int64_t units = 0;  ///< on the CPU shared by threads; on a GPU blocks of threads
  double tiles = 0;        ///< visits: of a block of rows at a line, or tile, of columns
  double useful = 0;       ///< multiply-adds for pairs of a query and a key that it sees
  double executed = 0;     ///< multiply-adds that the pass does
  double weights = 0;      ///< pairs whose weight it computes
  double masked = 0;       ///< of these, pairs in vectors, or tiles, that need a mask
  double calls = 0;        ///< of a vector kernel for a block of rows; on a GPU 0
  double packs = 0;        ///< runs of columns that are packed; on a GPU 0
  double packed = 0;       ///< bytes that are packed, or copied to shared memory
  double read = 0;         ///< bytes read from tensors; what is read again counts again
  double written = 0;      ///< bytes written to tensors
  /// The average thread's work by that of the busiest one; 1 on a GPU and for streams.
  double balance = 1;
};

/// What fused attention would do, found by the kernels' own walk over windows without running
/// them: on the CPU that of the backend "vectorized", on CUDA that of "fna", which needs neither a
/// GPU nor a build with CUDA. Reads no data, like `describe`. Gradients of biases are not counted.
/// `threads`: among how many the CPU shares the work. Throws Error.
NATTEN_EXPORT std::vector<PassWork> work_of(const Call& call, int threads = 1);

/// The same for kernels whose tiles lie on a fixed grid, as NATTEN's do, which first put the tokens
/// of a tile next to each other: the forward pass of a call, with one tile shape for queries and
/// one for keys, of any size. Throws Error.
NATTEN_EXPORT PassWork work_of_fixed_tiles(const Call& call, const Tuple& query_tile,
                                           const Tuple& key_tile);

}  // namespace natten
