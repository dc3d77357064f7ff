#include <natten/version.h>

#include <cstdint>
#include <cstdio>

float mean_of(const float* values, std::int64_t count);

int main() {
  const float values[] = {1, 2, 6};
  std::printf("mean %g by natten %s\n", mean_of(values, 3), natten::version());
  return mean_of(values, 3) == 3.0f ? 0 : 1;
}
