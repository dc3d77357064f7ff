#include <natten/natten.h>

#include <cstdio>

float mean_of(const float* values, std::int64_t count);

// With a static natten there are two copies of it here, the host's and this program's.
int main() {
  const float values[] = {1, 2, 6};
  std::printf("mean %g by natten %s\n", static_cast<double>(mean_of(values, 3)), natten::version());
  try {
    mean_of(values, 0);
  } catch (const natten::Error&) {
    return mean_of(values, 3) == 3.0f ? 0 : 1;
  }
  return 1;
}
