#pragma once

#include <natten/context.h>
#include <natten/problem.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace natten {

/// How a backend cuts a problem into work. Fields that are 0 or empty are left to the backend, so a
/// default-constructed configuration is its default. On the CPU all give the same bits.
struct Configuration {
  std::int64_t strip = 0;      ///< CPU: rows of a line that share what is packed, at most
  std::int64_t stack = 0;      ///< CPU: lines of rows that are handled together, at most
  std::int64_t heads = 0;      ///< CPU: heads that are packed together, at most
  Tuple query_tile, key_tile;  ///< CUDA: shapes of tiles

  bool is_default() const;
};
NATTEN_EXPORT bool operator==(const Configuration& a, const Configuration& b);
inline bool operator!=(const Configuration& a, const Configuration& b) { return !(a == b); }
inline bool Configuration::is_default() const { return *this == Configuration(); }

/// "default", or what differs from it: "strip=64 heads=2", "query_tile=8x8 key_tile=4x16".
NATTEN_EXPORT std::string to_string(const Configuration& configuration);
/// The inverse; nothing where the text is none of these.
NATTEN_EXPORT std::optional<Configuration> configuration_named(std::string_view text);

/// What the chosen backend may try for a problem, its default first. `threads`: how many run it on
/// the CPU. `thorough`: more candidates. Throws Error where no backend takes the problem.
NATTEN_EXPORT std::vector<Configuration> candidates(const Problem& problem, int threads,
                                                    bool thorough = false,
                                                    const Context& context = {});

/// How much a search may take.
struct TuningLimits {
  int warmup_steps = 5;  ///< runs of each candidate before it is timed, where there is time
  int steps = 5;         ///< turns, in each of which every candidate is timed once
  double seconds = 2;    ///< when to stop
  bool thorough = false;
};

/// Where a configuration comes from.
enum class Origin : std::uint8_t {
  default_choice,  ///< the backend's own
  tuned,           ///< timed by this process; it may be the default, where nothing beat that
  cache,           ///< read from a file
};
NATTEN_EXPORT const char* name_of(Origin);

/// The configuration that a search has found.
struct Choice {
  Configuration configuration;
  Origin origin = Origin::default_choice;
  double default_seconds = 0;  ///< 0: was not timed
  double seconds = 0;          ///< of the configuration
};

/// Finds the configuration of least cost; candidates are timed in turns. The first one, the
/// default, stands unless another beats it in turns of these two alone: by more than the default's
/// own costs vary, in three of four turns, and in the least cost of both.
NATTEN_EXPORT Choice search(const std::vector<Configuration>& candidates,
                            const std::function<double(const Configuration&)>& cost,
                            const TuningLimits& limits = {});

/// The machine that a choice is for. The name is of the instruction set and processor, or of the
/// GPU; threads are 0 on a GPU.
struct Machine {
  std::string_view name;
  int threads = 0;
};

/// Of the chosen backend. Throws Error where no backend takes the problem.
NATTEN_EXPORT Machine machine_of(const Problem& problem, const Context& context = {});

/// Choices by problem, backend and machine: in memory and, where there is a folder, in files that
/// other processes may read and write at the same time. A file that is torn, of another version of
/// the library or of another machine is no choice. In memory devices are known by their numbers, as
/// a process has one of each. All functions may be called by many threads.
class NATTEN_EXPORT TuningCache {
 public:
  /// Empty: in memory only. The folder is made when it is first written to.
  explicit TuningCache(std::string directory = {});
  ~TuningCache();
  TuningCache(const TuningCache&) = delete;
  TuningCache& operator=(const TuningCache&) = delete;

  /// `accepts` says whether a configuration from a file may be used. Where there is no choice, the
  /// folder is read again a second later at the earliest.
  std::optional<Choice> find(const Problem& problem, const char* backend, const Machine& machine,
                             const std::function<bool(const Configuration&)>& accepts);
  void store(const Problem& problem, const char* backend, const Machine& machine,
             const Choice& choice);
  /// The file of a choice. Empty where there is no folder.
  std::string path_of(const Problem& problem, const char* backend, const Machine& machine) const;
  /// Forgets what is in memory, and goes on with another folder.
  void reset(std::string directory);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// What calls do where `Options::tuning` allows it. `record` appends each problem that a process
/// meets to a file once, and uses nothing tuned.
enum class TuningMode : std::uint8_t { off, read, record, tune };

/// Of the process.
struct TuningSettings {
  TuningMode forward = TuningMode::off, backward = TuningMode::off;
  std::string cache_dir;  ///< empty: choices are kept in memory only
  std::string record_file = "problems.json";
  TuningLimits forward_limits, backward_limits;
};
/// Initially NATTEN_TUNE (off, read, record or tune, for both passes), NATTEN_CACHE_DIR and
/// NATTEN_TUNE_FILE. Throws Error where NATTEN_TUNE is none of these words.
NATTEN_EXPORT TuningSettings tuning_settings();
NATTEN_EXPORT void set_tuning_settings(const TuningSettings& settings);

/// The backend and configuration that a call would run with, by what is known now. Nothing is
/// timed. Throws Error.
NATTEN_EXPORT Choice choice_for(const Problem& problem, const Context& context = {});

/// Tunes a problem whatever the mode is, on tensors of its own, and stores the choice. CPU only.
/// Throws Error.
NATTEN_EXPORT Choice tune(const Problem& problem, const Context& context = {});

/// A problem as a line of text, without the number of its device, and the problem that a line
/// describes. Throws Error where no call has such a problem.
NATTEN_EXPORT std::string to_text(const Problem& problem);
NATTEN_EXPORT Problem problem_of(std::string_view text);

/// Something about the cache that its user may want to know; calls go on silently.
struct TuningNote {
  bool is_warning = false;  ///< else of interest to a debugger
  std::string text;
};
/// The notes since the last time, oldest first; the latest hundred are kept.
NATTEN_EXPORT std::vector<TuningNote> take_tuning_notes();

}  // namespace natten
