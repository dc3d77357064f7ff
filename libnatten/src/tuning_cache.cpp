#include <natten/attention.h>
#include <natten/error.h>
#include <natten/roles.h>
#include <natten/version.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <locale>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <system_error>
#include <unordered_map>

#include "tuner.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

// Choices in memory and in files, and problems as text.

namespace natten {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

// The file of a choice is small; a larger file is something else.
constexpr std::size_t kMostFileBytes = 1 << 14;
constexpr auto kLookAgain = std::chrono::seconds(1);
constexpr const char* kFormat = "natten choice 1";

/// Whether scores grow with products, which is all that matters of the scale.
bool is_positive(double scale) { return scale > 0; }

struct Key {
  // Besides the problem: the number of its device, the sign of its scale, threads and the backend.
  std::array<std::int64_t, detail::kProblemWords + 4> words{};

  Key(const Problem& problem, const char* backend, int threads) {
    // Its place is the function's own, for which no word has to wait in memory.
    detail::visit_problem(problem, [to = words.data()](const char*, const auto& value) mutable {
      *to++ = static_cast<std::int64_t>(value);
    });
    std::size_t at = detail::kProblemWords;
    words[at++] = problem.device.index;
    words[at++] = is_positive(problem.scale);
    words[at++] = threads;
    for (const char* c = backend; *c; ++c) words[at] = words[at] * 31 + *c;
  }
  friend bool operator==(const Key& a, const Key& b) {
    return std::memcmp(a.words.data(), b.words.data(), sizeof a.words) == 0;
  }
};

struct HashOfKey {
  std::size_t operator()(const Key& key) const {
    // A sum of products, none of which waits for another.
    constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;
    std::uint64_t sum = 0, factor = kOdd;
    for (const std::int64_t word : key.words) {
      sum += static_cast<std::uint64_t>(word) * factor;
      factor += 2 * kOdd;
    }
    return static_cast<std::size_t>((sum ^ sum >> 32) * kOdd >> 16);
  }
};

/// What is known of a problem: a choice, or that there was none when it was looked for.
struct Entry {
  std::optional<Choice> choice;
  Clock::time_point looked;
};

std::uint64_t fnv(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}
std::string hex(std::uint64_t number) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(number));
  return text;
}

/// The lines of a file that say what its choice is for.
std::string head_of(const Problem& problem, const char* backend, const Machine& machine) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << kFormat << "\nversion " << version() << "\nmachine " << machine.name << "\nthreads "
       << machine.threads << "\nbackend " << backend << "\nproblem " << to_text(problem) << '\n';
  return text.str();
}

std::string text_of(const std::string& head, const Choice& choice) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.precision(9);
  text << head << "configuration " << to_string(choice.configuration) << "\ndefault_seconds "
       << choice.default_seconds << "\nseconds " << choice.seconds << '\n';
  return text.str() + "check " + hex(fnv(text.str())) + '\n';
}

/// A file that is too large reads as one that is torn.
std::optional<std::string> read_file(const std::string& path) {
  std::ifstream file(fs::u8path(path), std::ios::binary);
  if (!file) return {};
  std::string text(kMostFileBytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  return text;
}

/// The choice in a file's text; where there is none, `why` says so.
std::optional<Choice> choice_in(const std::string& text, const std::string& head,
                                std::string& why) {
  const std::size_t check = text.rfind("check ");
  if (text.compare(0, std::strlen(kFormat), kFormat) != 0 || check == std::string::npos ||
      text.substr(check) != "check " + hex(fnv(std::string_view(text).substr(0, check))) + '\n') {
    why = "it is torn, or no choice";
    return {};
  }
  if (text.compare(0, head.size(), head) != 0) {
    why = "it is of another version, machine or problem";
    return {};
  }
  std::istringstream lines(text.substr(head.size(), check - head.size()));
  lines.imbue(std::locale::classic());
  std::string word, configuration;
  Choice choice;
  choice.origin = Origin::cache;
  lines >> word >> std::ws;
  std::getline(lines, configuration);
  lines >> word >> choice.default_seconds >> word >> choice.seconds;
  const std::optional<Configuration> named = configuration_named(configuration);
  if (!lines || !named) {
    why = "it names no configuration";
    return {};
  }
  choice.configuration = *named;
  return choice;
}

int process_id() {
#ifdef _WIN32
  return _getpid();
#else
  return getpid();
#endif
}

/// Writes a file as a whole or not at all, whoever else writes it. Returns why it could not.
std::string write_whole(const std::string& path, const std::string& text) {
  static std::atomic<unsigned> count{0};
  const fs::path to = fs::u8path(path);
  std::error_code error;
  fs::create_directories(to.parent_path(), error);
  if (error) return error.message();
  const fs::path draft = fs::u8path(path + "." + std::to_string(process_id()) + "." +
                                    std::to_string(count++) + ".tmp");
  {
    std::ofstream file(draft, std::ios::binary);
    file << text;
    file.close();
    if (!file) {
      fs::remove(draft, error);
      return "a file cannot be written there";
    }
  }
  fs::rename(draft, to, error);
  if (!error) return {};
  std::error_code ignored;
  fs::remove(draft, ignored);
  return error.message();
}

}  // namespace

struct TuningCache::State {
  mutable std::shared_mutex mutex;
  std::string directory;
  std::unordered_map<Key, Entry, HashOfKey> entries;
  bool told_unwritable = false;
};

TuningCache::TuningCache(std::string directory) : state_(std::make_unique<State>()) {
  state_->directory = std::move(directory);
}
TuningCache::~TuningCache() = default;

void TuningCache::reset(std::string directory) {
  const std::unique_lock lock(state_->mutex);
  state_->entries.clear();
  state_->directory = std::move(directory);
  state_->told_unwritable = false;
}

std::string TuningCache::path_of(const Problem& problem, const char* backend,
                                 const Machine& machine) const {
  const std::shared_lock lock(state_->mutex);
  if (state_->directory.empty()) return {};
  return state_->directory + "/natten-" + hex(fnv(head_of(problem, backend, machine))) + ".choice";
}

std::optional<Choice> TuningCache::find(const Problem& problem, const char* backend,
                                        const Machine& machine,
                                        const std::function<bool(const Configuration&)>& accepts) {
  const Key key(problem, backend, machine.threads);
  {
    const std::shared_lock lock(state_->mutex);
    const auto found = state_->entries.find(key);
    if (found != state_->entries.end()) {
      const Entry& entry = found->second;
      if (entry.choice || state_->directory.empty() || Clock::now() - entry.looked < kLookAgain)
        return entry.choice;
    }
  }
  Entry entry{{}, Clock::now()};
  const std::string path = path_of(problem, backend, machine);
  if (const std::optional<std::string> text = path.empty() ? std::nullopt : read_file(path)) {
    std::string why;
    entry.choice = choice_in(*text, head_of(problem, backend, machine), why);
    if (entry.choice && !accepts(entry.choice->configuration)) {
      entry.choice.reset();
      why = "the backend offers no such configuration";
    }
    if (!entry.choice) detail::note(false, path + ": ignored, as " + why);
  }
  const std::unique_lock lock(state_->mutex);
  Entry& known = state_->entries.try_emplace(key, entry).first->second;
  if (!known.choice) known = entry;  // another thread may have found one
  return known.choice;
}

void TuningCache::store(const Problem& problem, const char* backend, const Machine& machine,
                        const Choice& choice) {
  {
    const std::unique_lock lock(state_->mutex);
    state_->entries.insert_or_assign(Key(problem, backend, machine.threads),
                                     Entry{choice, Clock::now()});
  }
  const std::string path = path_of(problem, backend, machine);
  if (path.empty()) return;
  const std::string why = write_whole(path, text_of(head_of(problem, backend, machine), choice));
  if (why.empty()) return;
  const std::unique_lock lock(state_->mutex);
  if (state_->told_unwritable) return;
  state_->told_unwritable = true;
  detail::note(true, "cache folder \"" + state_->directory + "\": " + why +
                         "; what is tuned is kept in this process alone");
}

std::string to_string(const Configuration& c) {
  std::string text;
  const auto add = [&](const char* name, const std::string& value) {
    text += (text.empty() ? "" : " ") + std::string(name) + "=" + value;
  };
  for (const auto& [name, value] :
       {std::pair("strip", c.strip), std::pair("stack", c.stack), std::pair("heads", c.heads)})
    if (value != 0) add(name, std::to_string(value));
  for (const auto& [name, tile] :
       {std::pair("query_tile", &c.query_tile), std::pair("key_tile", &c.key_tile)}) {
    std::string extents;
    for (int i = 0; i < tile->size; ++i) extents += (i ? "x" : "") + std::to_string((*tile)[i]);
    if (tile->size > 0) add(name, extents);
  }
  return text.empty() ? "default" : text;
}

std::optional<Configuration> configuration_named(std::string_view text) {
  Configuration c;
  if (text == "default") return c;
  std::istringstream words{std::string(text)};
  words.imbue(std::locale::classic());
  for (std::string word; words >> word;) {
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) return {};
    const std::string name = word.substr(0, equals);
    std::istringstream value(word.substr(equals + 1));
    value.imbue(std::locale::classic());
    Tuple tile;
    do {
      if (tile.size == kMaxRank || !(value >> tile.values[static_cast<std::size_t>(tile.size)]))
        return {};
      ++tile.size;
    } while (value.peek() == 'x' && value.get());
    if (value.peek() != std::char_traits<char>::eof()) return {};
    if (name == "query_tile")
      c.query_tile = tile;
    else if (name == "key_tile")
      c.key_tile = tile;
    else if (tile.size != 1)
      return {};
    else if (name == "strip")
      c.strip = tile[0];
    else if (name == "stack")
      c.stack = tile[0];
    else if (name == "heads")
      c.heads = tile[0];
    else
      return {};
  }
  // Text that is not what would be written for it, such as a name twice or a 0, is refused.
  if (to_string(c) != text) return {};
  return c;
}

bool operator==(const Configuration& a, const Configuration& b) {
  const auto same = [](const Tuple& x, const Tuple& y) {
    return x.size == y.size &&
           std::equal(x.values.begin(), x.values.begin() + x.size, y.values.begin());
  };
  return a.strip == b.strip && a.stack == b.stack && a.heads == b.heads &&
         same(a.query_tile, b.query_tile) && same(a.key_tile, b.key_tile);
}

namespace {

template <class T>
constexpr bool has_name =
    std::is_same_v<T, Op> || std::is_same_v<T, DType> || std::is_same_v<T, DeviceType>;

/// Whether its sizes can be multiplied.
bool has_size_of_memory(const Problem& problem) {
  double elements = 1;
  const auto times = [&](std::int64_t size) {
    elements *= std::max(1.0, std::abs(static_cast<double>(size)));
  };
  for (const std::int64_t size : {problem.batch, problem.heads, problem.kv_heads,
                                  problem.head_dim + problem.value_dim, problem.additional})
    times(size);
  for (const Axis& axis : problem.axes) {
    times(std::max(axis.query_length, axis.key_length));
    times(axis.kernel_size);
  }
  return elements < 0x1p62;
}

}  // namespace

std::string to_text(const Problem& problem) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << name_of(problem.op) << ' ' << name_of(problem.dtype) << ' '
       << name_of(problem.device.type);
  int at = 0;
  detail::visit_problem(problem, [&](const char* name, const auto& value) {
    if (at++ >= 3) text << ' ' << name << '=' << static_cast<std::int64_t>(value);
  });
  text << " positive_scale=" << is_positive(problem.scale);
  return text.str();
}

Problem problem_of(std::string_view text) {
  const auto malformed = [&] {
    return Error(ErrorKind::invalid_value,
                 "problem: got \"" + std::string(text.substr(0, 200)) + "\", which describes none");
  };
  std::istringstream words{std::string(text)};
  words.imbue(std::locale::classic());
  Problem problem;
  int at = 0;
  std::string word;
  detail::visit_problem(problem, [&](const char* name, auto& value) {
    using Value = std::decay_t<decltype(value)>;
    if (!(words >> word)) throw malformed();
    if (at++ < 3) {
      if constexpr (has_name<Value>)
        for (int i = 0; i <= static_cast<int>(Op::rpb_scatter); ++i) {
          value = static_cast<Value>(i);
          if (word == name_of(value) && word != "unknown") return;
        }
      throw malformed();
    }
    const std::string head = std::string(name) + "=";
    std::int64_t number = 0;
    std::istringstream digits(word.compare(0, head.size(), head) == 0 ? word.substr(head.size())
                                                                      : "");
    digits.imbue(std::locale::classic());
    if (!(digits >> number) || digits.peek() != std::char_traits<char>::eof()) throw malformed();
    value = static_cast<Value>(number);
    if (static_cast<std::int64_t>(value) != number) throw malformed();
  });
  if (!(words >> word)) throw malformed();
  problem.scale = word == "positive_scale=1" ? 1.0 : -1.0;
  if (to_text(problem) != text) throw malformed();
  if (problem.rank < 1 || problem.rank > kMaxRank || !has_size_of_memory(problem))
    throw malformed();
  // A call is checked as all calls are; what it describes may differ in spans and scales alone.
  const Problem described = describe(detail::call_of(problem));
  if (to_text(described) != text) throw malformed();
  return described;
}

Call detail::call_of(const Problem& problem) {
  Call call;
  call.op = problem.op;
  const bool is_backward = problem.op == Op::attention_backward;
  Options& o = call.options;
  o.empty_slots = problem.empty_slots;
  o.deterministic = problem.deterministic;
  o.allow_tf32 = problem.allow_tf32;
  if (is_fused(problem.op))
    o.scale = is_positive(problem.scale) ? std::optional<double>() : problem.scale;
  (is_backward ? o.backward_query_tile : o.query_tile) = problem.query_tile;
  (is_backward ? o.backward_key_tile : o.key_tile) = problem.key_tile;
  o.key_splits = problem.key_splits;
  Neighborhood& n = call.neighborhood;
  bool is_whole = true, may_be_attention = true;
  for (int i = kMaxRank - problem.rank; i < kMaxRank; ++i) {
    const Axis& axis = problem.axes[i];
    for (const auto& [tuple, value] :
         {std::pair(&n.kernel_size, axis.kernel_size), std::pair(&n.stride, axis.stride),
          std::pair(&n.dilation, axis.dilation),
          std::pair(&n.is_causal, std::int64_t{axis.is_causal}),
          std::pair(&n.boundary, static_cast<std::int64_t>(axis.boundary)),
          std::pair(&n.query_offset, axis.query_offset), std::pair(&n.key_offset, axis.key_offset),
          std::pair(&n.grid_size, axis.grid_length)})
      tuple->values[static_cast<std::size_t>(tuple->size++)] = value;
    const bool begins_at_0 = axis.query_offset == 0 && axis.key_offset == 0;
    is_whole = is_whole && begins_at_0 && axis.query_length == axis.key_length &&
               axis.grid_length == axis.key_length;
    may_be_attention = may_be_attention && begins_at_0 && axis.kernel_size == axis.key_length &&
                       axis.grid_length == axis.key_length && axis.boundary == Boundary::shift;
  }
  if (is_whole || may_be_attention) n.query_offset = n.key_offset = n.grid_size = {};
  o.separate_key_grid = may_be_attention && !is_whole;
  o.allow_no_keys = o.separate_key_grid;
  const auto is_given = [&](const Role& role) {
    using T = Tensors;
    const auto is = [&](TensorView T::*tensor) { return role.tensor == tensor; };
    if (is(&T::rpb)) return problem.has_rpb;
    if (is(&T::key_mask)) return problem.has_key_mask;
    if (is(&T::additional_keys) || is(&T::additional_values))
      return problem.additional > 0 || problem.wants_grad_additional;
    if (is(&T::grad_logsumexp)) return problem.has_grad_logsumexp;
    if (is(&T::grad_query)) return problem.wants_grad_query;
    if (is(&T::grad_key)) return problem.wants_grad_key;
    if (is(&T::grad_value)) return problem.wants_grad_value;
    if (is(&T::grad_rpb)) return problem.wants_grad_rpb;
    if (is(&T::grad_additional_keys) || is(&T::grad_additional_values))
      return problem.wants_grad_additional;
    return true;
  };
  for (const Role& role : roles_of(problem.op)) {
    if (!is_given(role)) continue;
    TensorView view = expected(problem, role.tensor);
    if (role.is_mask) view.dtype = DType::boolean;
    call.tensors.*role.tensor = view;
  }
  return call;
}

}  // namespace natten
