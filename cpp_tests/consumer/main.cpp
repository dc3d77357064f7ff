#include <natten/natten.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

// na2d over a 4 x 4 image with a 3 x 3 window. With a query of zeros all weights are equal, so each
// output is the mean of its window; with value[y][x] = 4 y + x that is the value in its middle, and
// windows at the border are shifted inwards: the middle is (clamp(y, 1, 2), clamp(x, 1, 2)).
int main() {
  constexpr int kSide = 4;
  std::vector<float> query(kSide * kSide, 0.0f), key(kSide * kSide, 1.0f), value(kSide * kSide),
      output(kSide * kSide), logsumexp(kSide * kSide);
  for (int i = 0; i < kSide * kSide; ++i) value[i] = static_cast<float>(i);
  const auto tensor = [&](std::vector<float>& data) {
    return natten::view(data.data(), {1, kSide, kSide, 1, 1});
  };
  try {
    natten::na2d_forward(tensor(output), tensor(query), tensor(key), tensor(value), std::nullopt,
                         natten::view(logsumexp.data(), {1, kSide, kSide, 1}), {3, 3}, {1, 1},
                         {false, false}, 1.0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "na2d_forward: %s\n", error.what());
    return 1;
  }

  const auto middle = [](int i) { return i < 1 ? 1 : i > 2 ? 2 : i; };
  int mistakes = 0;
  for (int y = 0; y < kSide; ++y)
    for (int x = 0; x < kSide; ++x) {
      const float expected = static_cast<float>(kSide * middle(y) + middle(x));
      const float got = output[kSide * y + x], lse = logsumexp[kSide * y + x];
      if (std::fabs(got - expected) < 1e-5f && std::fabs(lse - std::log(9.0f)) < 1e-5f) continue;
      std::fprintf(stderr, "(%d, %d): got %g with logsumexp %g, expected %g\n", y, x, got, lse,
                   expected);
      ++mistakes;
    }

  // Exceptions of the library are caught by their type across its boundary.
  bool refused = false;
  try {
    natten::na2d_forward(tensor(output), tensor(query), tensor(key), tensor(value), std::nullopt,
                         std::nullopt, {5, 3}, {1, 1}, {false, false}, 1.0);
  } catch (const natten::Error& error) {
    refused = error.kind() == natten::ErrorKind::invalid_value;
    std::printf("refused as it should: %s\n", error.what());
  }
  std::printf("na2d: %d of %d outputs are wrong\n", mistakes, kSide * kSide);
  return mistakes == 0 && refused ? 0 : 1;
}
