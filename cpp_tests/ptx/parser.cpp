#include "parser.h"

#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>
#include <unordered_map>
#include <utility>

namespace natten_tests::ptx {
namespace {

using Texts = std::vector<std::string>;

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

/// At separators outside of brackets.
Texts split(const std::string& text, char separator) {
  Texts parts{""};
  int depth = 0;
  for (char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == separator && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trimmed(part);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

/// Bits without a meaning count as unsigned integers.
std::optional<Type> type_of(const std::string& text) {
  static const std::unordered_map<std::string, Type> types{
      {"pred", Type::pred}, {"u8", Type::u8},       {"u16", Type::u16},       {"u32", Type::u32},
      {"u64", Type::u64},   {"s8", Type::s8},       {"s16", Type::s16},       {"s32", Type::s32},
      {"s64", Type::s64},   {"b8", Type::u8},       {"b16", Type::u16},       {"b32", Type::u32},
      {"b64", Type::u64},   {"f16", Type::f16},     {"f32", Type::f32},       {"f64", Type::f64},
      {"bf16", Type::bf16}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"tf32", Type::tf32},
  };
  const auto found = types.find(text);
  if (found == types.end()) return {};
  return found->second;
}

/// What follows the first part of an instruction's name: `ld`.`shared`.`v4`.`u32`. Each part has to
/// be taken by someone, so that none is silently ignored.
class Modifiers {
 public:
  explicit Modifiers(Texts parts) : parts_(std::move(parts)) {}

  bool take(const std::string& text) {
    const auto found = std::find(parts_.begin(), parts_.end(), text);
    if (found == parts_.end()) return false;
    parts_.erase(found);
    return true;
  }
  void expect(const std::string& text) {
    if (!take(text)) throw Fault("no ." + text);
  }
  /// The last part, which is a type.
  Type take_type() {
    const auto type = parts_.empty() ? std::nullopt : type_of(parts_.back());
    if (!type) throw Fault("no type at its end");
    parts_.pop_back();
    return *type;
  }
  std::string take_first() {
    if (parts_.empty()) throw Fault("its name ends too early");
    std::string first = parts_.front();
    parts_.erase(parts_.begin());
    return first;
  }
  void expect_none_left() const {
    if (!parts_.empty()) throw Fault("." + parts_.front() + " is not known");
  }

 private:
  Texts parts_;
};

class EntryParser {
 public:
  EntryParser(const std::string& mangled, Entry& entry) : mangled_(mangled), entry_(entry) {}

  void parse(const std::string& body, int line) {
    std::istringstream in(body);
    std::string text;
    for (; std::getline(in, text); ++line) {
      try {
        parse_line(trimmed(text.substr(0, text.find("//"))), line);
      } catch (const Fault& fault) {
        throw Fault(entry_.name + ", PTX line " + std::to_string(line) + " (" + trimmed(text) +
                    "): " + fault.what());
      }
    }
    for (const auto& [at, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault(entry_.name + ": no label " + label);
      entry_.code[at].target = found->second;
    }
    Instruction end;
    end.opcode = Opcode::ret;
    end.line = line;
    entry_.code.push_back(end);
    entry_.counts.assign(entry_.code.size(), 0);
  }

 private:
  void parse_line(std::string text, int line) {
    if (text.empty() || text == "{" || text == "}") return;
    if (text.back() == ':') {
      labels_[text.substr(0, text.size() - 1)] = static_cast<std::int32_t>(entry_.code.size());
      return;
    }
    if (starts_with(text, ".reg")) return declare(text);
    if (starts_with(text, ".pragma") || starts_with(text, ".loc")) return;
    if (text[0] == '.') throw Fault("this directive is not known");
    if (text.back() != ';') throw Fault("an instruction of more than a line");
    text.pop_back();

    Instruction in;
    in.line = line;
    if (text[0] == '@') {
      const auto end = text.find_first_of(" \t");
      in.is_guarded = true;
      in.is_guard_negated = text[1] == '!';
      const std::size_t begin = in.is_guard_negated ? 2 : 1;
      in.guard = operand(text.substr(begin, end - begin), 0).at;
      text = trimmed(text.substr(end));
    }
    const auto end = text.find_first_of(" \t");
    Texts name = split(text.substr(0, end), '.');
    const std::string first = name[0];
    name.erase(name.begin());
    const Texts operands = end == std::string::npos ? Texts{} : split(text.substr(end), ',');
    Modifiers modifiers(name);
    parse_instruction(in, first, modifiers, operands);
    modifiers.expect_none_left();
    entry_.code.push_back(in);
  }

  /// `.reg .b32 %r<7>;`
  void declare(const std::string& text) {
    std::istringstream in(text);
    std::string reg, type, names;
    in >> reg >> type;
    std::getline(in, names);
    const auto known = type_of(type.empty() ? type : type.substr(1));
    if (!known || names.empty() || names.back() != ';') throw Fault("not known how to read it");
    names.pop_back();
    for (const std::string& name : split(names, ','))
      declared_[name.substr(0, name.find('<'))] = bytes_of(*known);
  }

  /// Registers for all lanes; a predicate's are the bits of one word.
  Operand allocate(int bytes) {
    constexpr std::int32_t kAlignment = 32;
    const Operand made{entry_.register_bytes, bytes};
    const std::int32_t size = bytes == 0 ? 4 : bytes * kLanes;
    entry_.register_bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    return made;
  }

  Operand register_of(const std::string& name) {
    if (const auto known = registers_.find(name); known != registers_.end()) return known->second;
    Operand made;
    if (name == "%tid.x" || name == "%ctaid.x") {
      made = allocate(4);
      (name == "%tid.x" ? entry_.thread : entry_.block) = made.at;
    } else {
      auto declared = declared_.find(name);
      if (declared == declared_.end())
        declared = declared_.find(name.substr(0, name.find_last_not_of("0123456789") + 1));
      if (declared == declared_.end()) throw Fault("the register " + name + " is not known");
      made = allocate(declared->second);
    }
    return registers_[name] = made;
  }

  Operand constant(std::uint64_t value, int bytes) {
    if (bytes == 0) value = value != 0 ? kAllLanes : 0;
    if (bytes == 2) value &= 0xffff;
    if (bytes == 4) value &= 0xffffffff;
    const auto [found, is_new] = constants_.try_emplace({value, bytes});
    if (is_new) {
      found->second = allocate(bytes);
      entry_.constants.push_back({found->second, value});
    }
    return found->second;
  }

  /// A register of so many bytes per lane, or of as many or more where it may be wider; or a
  /// constant.
  Operand operand(const std::string& text, int bytes, bool may_be_wider = false) {
    if (text.empty()) throw Fault("an operand is missing");
    if (text[0] == '%') {
      const Operand made = register_of(text);
      if (may_be_wider ? made.bytes < bytes : made.bytes != bytes)
        throw Fault(text + " has " + std::to_string(made.bytes) + " bytes, not " +
                    std::to_string(bytes));
      return made;
    }
    if (text[0] == '0' && text.size() > 2 && std::string("fFdD").find(text[1]) != std::string::npos)
      return constant(std::strtoull(text.c_str() + 2, nullptr, 16), bytes);
    if (std::isdigit(static_cast<unsigned char>(text[0])))
      return constant(std::strtoull(text.c_str(), nullptr, 0), bytes);
    if (text[0] == '-')
      return constant(static_cast<std::uint64_t>(std::strtoll(text.c_str(), nullptr, 0)), bytes);
    // Parameters, of which a kernel has one, and shared memory start at 0.
    if (text == mangled_ + "_param_0" || text.find("shared") != std::string::npos)
      return constant(0, bytes);
    throw Fault(text + " is not known");
  }

  /// Reads operands by a signature, a letter for each:
  ///   t  of the instruction's type        f  of the type that it converts from
  ///   w  twice as wide as its type        p  a predicate
  ///   2, 4, 8  of so many bytes           T, F  as t and f, but the register may be wider
  ///   a  an address [register + constant], in registers as wide as those of its space
  void read(Instruction& in, const Texts& texts, const std::string& signature) {
    Texts flat;
    for (const std::string& text : texts) {
      if (!text.empty() && text[0] == '{') {
        for (const std::string& part : split(text.substr(1, text.size() - 2), ','))
          flat.push_back(part);
      } else {
        for (const std::string& part : split(text, '|')) flat.push_back(part);
      }
    }
    if (flat.size() != signature.size())
      throw Fault("has " + std::to_string(flat.size()) + " operands, not " +
                  std::to_string(signature.size()));
    for (std::size_t i = 0; i < flat.size(); ++i) {
      if (in.operand_count == Instruction::kMostOperands) throw Fault("too many operands");
      in.operands[in.operand_count++] = read_one(in, flat[i], signature[i]);
    }
  }
  Operand read_one(Instruction& in, const std::string& text, char letter) {
    const int bytes = bytes_of(in.type);
    switch (letter) {
      case 't': return operand(text, bytes);
      case 'T': return operand(text, bytes, true);
      case 'w': return operand(text, 2 * bytes);
      case 'f': return operand(text, bytes_of(in.from));
      case 'F': return operand(text, bytes_of(in.from), true);
      case 'p': return operand(text, 0);
      case 'a': return address(in, text);
      default: return operand(text, letter - '0');
    }
  }
  /// Of shared memory 32 bits count, of other memory 64.
  Operand address(Instruction& in, const std::string& text) {
    if (text.size() < 3 || text.front() != '[' || text.back() != ']') throw Fault("no address");
    std::string base = text.substr(1, text.size() - 2);
    if (const auto plus = base.find_last_of('+'); plus != std::string::npos) {
      in.displacement += std::atoi(base.c_str() + plus + 1);
      base = trimmed(base.substr(0, plus));
    }
    if (base[0] != '%') return operand(base, 8);
    return operand(base, in.space == Space::shared ? 4 : 8, true);
  }

  void parse_instruction(Instruction& in, const std::string& name, Modifiers& modifiers,
                         const Texts& operands) {
    static const std::unordered_map<std::string, std::pair<Opcode, const char*>> simple{
        {"abs", {Opcode::abs, "tt"}},         {"add", {Opcode::add, "ttt"}},
        {"and", {Opcode::and_, "ttt"}},       {"bfi", {Opcode::bfi, "ttt44"}},
        {"div", {Opcode::div, "ttt"}},        {"ex2", {Opcode::ex2, "tt"}},
        {"fma", {Opcode::fma, "tttt"}},       {"max", {Opcode::max, "ttt"}},
        {"min", {Opcode::min, "ttt"}},        {"neg", {Opcode::neg, "tt"}},
        {"not", {Opcode::not_, "tt"}},        {"or", {Opcode::or_, "ttt"}},
        {"rcp", {Opcode::rcp, "tt"}},         {"rem", {Opcode::rem, "ttt"}},
        {"selp", {Opcode::select, "tttp"}},   {"shf", {Opcode::funnel_shift, "ttt4"}},
        {"shl", {Opcode::shift_left, "tt4"}}, {"shr", {Opcode::shift_right, "tt4"}},
        {"sub", {Opcode::sub, "ttt"}},        {"xor", {Opcode::xor_, "ttt"}},
    };
    if (const auto found = simple.find(name); found != simple.end()) {
      in.opcode = found->second.first;
      in.type = modifiers.take_type();
      read(in, operands, found->second.second);
      modifiers.take("rn");
      if (in.opcode == Opcode::fma) in.rounds_down = modifiers.take("rm");
      if (in.opcode == Opcode::rcp)
        in.is_approximate = modifiers.take("approx") && modifiers.take("ftz");
      if (in.opcode == Opcode::ex2) {
        modifiers.expect("approx");
        modifiers.expect("ftz");
      }
      if (in.opcode == Opcode::funnel_shift) {
        modifiers.expect("r");
        modifiers.expect("wrap");
      }
      return;
    }
    if (name == "mov") return parse_move(in, modifiers, operands);
    if (name == "mul" || name == "mad")
      return parse_product(in, name == "mad", modifiers, operands);
    if (name == "ld" || name == "st") return parse_memory(in, name == "ld", modifiers, operands);
    if (name == "setp") return parse_comparison(in, modifiers, operands);
    if (name == "cvt") return parse_conversion(in, modifiers, operands);
    if (name == "bra") {
      modifiers.take("uni");
      in.opcode = Opcode::branch;
      if (operands.size() != 1) throw Fault("no label");
      branches_.emplace_back(entry_.code.size(), operands[0]);
    } else if (name == "ret") {
      in.opcode = Opcode::ret;
    } else if (name == "cvta") {
      in.opcode = modifiers.take("to") ? Opcode::to_shared : Opcode::to_generic;
      in.space = modifiers.take("shared") ? Space::shared : Space::global;
      if (in.space == Space::global) modifiers.expect("global");
      in.type = modifiers.take_type();
      read(in, operands, "tt");
    } else if (name == "bar") {
      parse_barrier(in, modifiers, operands);
    } else if (name == "shfl") {
      modifiers.expect("sync");
      in.opcode = modifiers.take("bfly") ? Opcode::shuffle_xor : Opcode::shuffle;
      if (in.opcode == Opcode::shuffle) modifiers.expect("idx");
      in.type = modifiers.take_type();
      read(in, operands, "4p4444");
    } else if (name == "vote") {
      modifiers.expect("sync");
      modifiers.expect("all");
      modifiers.expect("pred");
      in.opcode = Opcode::vote_all;
      read(in, operands, "pp4");
    } else if (name == "atom") {
      modifiers.expect("global");
      modifiers.expect("add");
      in.opcode = Opcode::atom_add;
      in.space = Space::global;
      in.type = modifiers.take_type();
      read(in, operands, "tat");
    } else if (name == "ldmatrix") {
      for (const char* part : {"sync", "aligned", "m8n8", "x4", "shared", "b16"})
        modifiers.expect(part);
      in.opcode = Opcode::load_matrices;
      in.space = Space::shared;
      in.is_transposed = modifiers.take("trans");
      read(in, operands, "4444a");
    } else if (name == "mma") {
      parse_matrix_product(in, modifiers, operands);
    } else if (name == "cp") {
      parse_copy(in, modifiers, operands);
    } else {
      throw Fault(name + " is not known");
    }
  }

  void parse_move(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    in.type = modifiers.take_type();
    const bool from_parts = operands.size() == 2 && operands[1][0] == '{';
    const bool to_parts = operands.size() == 2 && operands[0][0] == '{';
    in.opcode = from_parts ? Opcode::pack : to_parts ? Opcode::unpack : Opcode::move;
    const std::string half(1, static_cast<char>('0' + bytes_of(in.type) / 2));
    read(in, operands, from_parts ? "t" + half + half : to_parts ? half + half + "t" : "tt");
  }

  void parse_product(Instruction& in, bool adds, Modifiers& modifiers, const Texts& operands) {
    in.type = modifiers.take_type();
    modifiers.take("rn");
    const bool is_wide = modifiers.take("wide");
    if (!is_wide && modifiers.take("hi")) {
      if (adds) throw Fault("mad.hi is not known");
      in.opcode = Opcode::mul_hi;
    } else if (is_wide) {
      in.opcode = adds ? Opcode::mad_wide : Opcode::mul_wide;
    } else {
      modifiers.take("lo");
      in.opcode = adds ? Opcode::mad : Opcode::mul;
    }
    read(in, operands, std::string(is_wide ? "wtt" : "ttt") + (adds ? is_wide ? "w" : "t" : ""));
  }

  static Space take_space(Modifiers& modifiers) {
    if (modifiers.take("shared")) return Space::shared;
    if (modifiers.take("param")) return Space::parameter;
    return modifiers.take("global") ? Space::global : Space::generic;
  }
  void parse_memory(Instruction& in, bool loads, Modifiers& modifiers, const Texts& operands) {
    in.opcode = loads ? Opcode::load : Opcode::store;
    in.type = modifiers.take_type();
    in.space = take_space(modifiers);
    if (loads) modifiers.take("nc");
    in.elements = static_cast<std::int8_t>(modifiers.take("v2") ? 2 : modifiers.take("v4") ? 4 : 1);
    const std::string values(static_cast<std::size_t>(in.elements), 'T');
    read(in, operands, loads ? values + "a" : "a" + values);
  }

  void parse_comparison(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    static const std::unordered_map<std::string, Comparison> comparisons{
        {"eq", Comparison::eq},   {"ne", Comparison::ne},   {"lt", Comparison::lt},
        {"le", Comparison::le},   {"gt", Comparison::gt},   {"ge", Comparison::ge},
        {"equ", Comparison::equ}, {"neu", Comparison::neu}, {"ltu", Comparison::ltu},
        {"leu", Comparison::leu}, {"gtu", Comparison::gtu}, {"geu", Comparison::geu}};
    in.opcode = Opcode::set_predicate;
    in.type = modifiers.take_type();
    const std::string comparison = modifiers.take_first();
    const auto found = comparisons.find(comparison);
    if (found == comparisons.end()) throw Fault("." + comparison + " is not known");
    in.comparison = found->second;
    in.combination = modifiers.take("and")   ? Combination::and_
                     : modifiers.take("or")  ? Combination::or_
                     : modifiers.take("xor") ? Combination::xor_
                                             : Combination::none;
    read(in, operands, in.combination == Combination::none ? "ptt" : "pttp");
  }

  void parse_conversion(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    in.opcode = Opcode::convert;
    in.from = modifiers.take_type();
    in.type = modifiers.take_type();
    in.is_saturated = modifiers.take("sat");
    in.rounds_to_even = modifiers.take("rni");
    modifiers.take("rzi");  // what integers are rounded to otherwise
    if (in.type == Type::tf32)
      modifiers.expect("rna");
    else
      modifiers.take("rn");
    const bool makes_two = in.type == Type::f16x2 || in.type == Type::bf16x2;
    read(in, operands, makes_two ? "tff" : "TF");
  }

  void parse_barrier(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    in.opcode = modifiers.take("warp") ? Opcode::warp_barrier : Opcode::barrier;
    modifiers.expect("sync");
    const char* all = in.opcode == Opcode::barrier ? "0" : "-1";
    if (operands != Texts{all}) throw Fault("not all threads of a block, or of a warp");
  }

  void parse_matrix_product(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    in.opcode = Opcode::multiply_matrices;
    for (const char* part : {"sync", "aligned", "row", "col"}) modifiers.expect(part);
    const Type sum = modifiers.take_type();
    in.type = modifiers.take_type();
    const Type of_b = in.type, of_a = modifiers.take_type(), result = modifiers.take_type();
    modifiers.expect(in.type == Type::tf32 ? "m16n8k8" : "m16n8k16");
    const bool is_known = in.type == Type::f16 || in.type == Type::bf16 || in.type == Type::tf32;
    if (!is_known || of_a != of_b || sum != Type::f32 || result != Type::f32)
      throw Fault("these types are not known");
    read(in, operands, "44444444444444");
  }

  void parse_copy(Instruction& in, Modifiers& modifiers, const Texts& operands) {
    modifiers.expect("async");
    if (modifiers.take("commit_group")) {
      in.opcode = Opcode::copy_commit;
    } else if (modifiers.take("wait_group")) {
      in.opcode = Opcode::copy_wait;
      if (operands.size() != 1) throw Fault("no number of groups");
      in.displacement = std::atoi(operands[0].c_str());
    } else {
      in.opcode = Opcode::copy_async;
      if (!modifiers.take("cg")) modifiers.expect("ca");
      modifiers.expect("shared");
      modifiers.expect("global");
      in.space = Space::shared;
      const bool may_be_zeros = operands.size() == 4;
      if (operands.size() < 3 || operands[0].find('+') != std::string::npos ||
          operands[1].find('+') != std::string::npos)
        throw Fault("its operands are not known");
      // Bytes that are not copied from memory are zero.
      read(in, {operands[0]}, "a");
      in.space = Space::global;
      read(in, {operands[1]}, "a");
      in.elements = static_cast<std::int8_t>(std::atoi(operands[2].c_str()));
      if (in.elements != 4 && in.elements != 8 && in.elements != 16)
        throw Fault("this number of bytes is not known");
      read(in, {operands[may_be_zeros ? 3 : 2]}, "4");
    }
  }

  const std::string& mangled_;
  Entry& entry_;
  std::unordered_map<std::string, int> declared_;  ///< bytes of registers
  std::unordered_map<std::string, Operand> registers_;
  std::map<std::pair<std::uint64_t, int>, Operand> constants_;
  std::unordered_map<std::string, std::int32_t> labels_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
};

}  // namespace

namespace {

/// Of an entry of the library, the type of its kernel, without namespaces.
std::string short_name(std::string name) {
  const std::string begin = "entry<", end = ">(";
  const auto first = name.find(begin), last = name.find(end);
  if (first != std::string::npos && last != std::string::npos)
    name = trimmed(name.substr(first + begin.size(), last - first - begin.size()));
  for (const std::string& space : {std::string("natten::detail::cuda::"), std::string("natten::")})
    for (auto at = name.find(space); at != std::string::npos; at = name.find(space))
      name.erase(at, space.size());
  return name;
}

}  // namespace

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = text ? text : name;
  std::free(text);
  return result;
}

void Module::add(const std::string& text) {
  std::istringstream in(text);
  std::string line;
  bool is_inside = false;
  for (int number = 1; std::getline(in, line); ++number) {
    constexpr char kEntry[] = ".entry ";
    if (line == "{") {
      is_inside = true;
      sources_.back().line = number + 1;
    } else if (line == "}") {
      is_inside = false;
    } else if (is_inside) {
      sources_.back().body += line + "\n";
    } else if (const auto at = line.find(kEntry); at != std::string::npos) {
      std::string name = line.substr(at + sizeof kEntry - 1);
      name = trimmed(name.substr(0, name.find('(')));
      sources_.push_back({name, demangled(name), {}, 0});
    }
  }
}

void Module::add_file(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw Fault("cannot read " + path);
  std::ostringstream text;
  text << in.rdbuf();
  add(text.str());
}

Entry* Module::find(const std::string& name) {
  for (Source& source : sources_) {
    if (source.name != name && source.mangled != name) continue;
    if (!source.parsed) {
      auto entry = std::make_unique<Entry>();
      entry->name = short_name(source.name);
      EntryParser(source.mangled, *entry).parse(source.body, source.line);
      source.parsed = entry.get();
      parsed_.push_back(std::move(entry));
    }
    return source.parsed;
  }
  return nullptr;
}

}  // namespace natten_tests::ptx
