#include <natten/natten.h>

#include <cstdio>
#include <string>

// Prints the table of docs/cpp.md that says what each operation takes.
int main() {
  using natten::Op;
  std::puts("| operation | tensor | dimensions | type | |");
  std::puts("| --- | --- | --- | --- | --- |");
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::av, Op::av_transpose,
                Op::rpb_gather, Op::rpb_scatter}) {
    std::string operation = std::string("`") + natten::name_of(op) + "`";
    for (const natten::Role& role : natten::roles_of(op)) {
      std::string dims;
      for (const char* d = role.dims; *d; ++d) {
        if (d != role.dims) dims += ", ";
        const bool is_grid = *d == 'Q' || *d == 'K' || *d == 'R';
        dims += std::string(is_grid ? "\\*" : "") + *d;
      }
      std::printf("| %s | `%s` | [%s] | %s | %s%s |\n", operation.c_str(), role.name, dims.c_str(),
                  role.is_mask        ? "bool"
                  : role.is_statistic ? "S"
                                      : "T",
                  role.is_required ? "" : "optional ", role.is_output ? "output" : "input");
      operation.clear();
    }
  }
}
