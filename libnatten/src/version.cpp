#include <natten/version.h>

namespace natten {

const char* version() noexcept { return NATTEN_VERSION; }

}  // namespace natten
