#pragma once

#include <natten/natten.h>

namespace natten::bindings {

/// Asks the system to back the memory of a large, new tensor by huge pages, before it is written.
/// glibc returns blocks of more than 32 MiB to the system when they are freed, so that each call's
/// outputs are new memory: with pages of 4 KiB a call would wait for thousands of them. Keeps
/// nothing, and has no effect where the system's setting is `never`.
void advise_huge_pages(const TensorView& view);

}  // namespace natten::bindings
