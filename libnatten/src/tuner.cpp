#include "tuner.h"

#include <natten/attention.h>
#include <natten/error.h>
#include <natten/roles.h>
#include <natten/version.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <set>
#include <utility>

#include "dispatch.h"
#include "registry.h"

// The search, the settings of the process, and what calls ask of them.

namespace natten {
namespace {

using Clock = std::chrono::steady_clock;

double median(std::vector<double> values) {
  const std::size_t half = values.size() / 2;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(half),
                   values.end());
  return values[half];
}

double least(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

/// Half of the values are no further from their median than this.
double deviation(const std::vector<double>& values) {
  const double middle = median(values);
  std::vector<double> distances;
  distances.reserve(values.size());
  for (const double value : values) distances.push_back(std::abs(value - middle));
  return median(distances);
}

struct Timed {
  Configuration configuration;
  std::vector<double> costs;
};

class Search {
 public:
  Search(const std::function<double(const Configuration&)>& cost, const TuningLimits& limits)
      : cost_(cost), limits_(limits) {}

  Choice run(const std::vector<Configuration>& candidates) {
    Choice choice;
    choice.origin = Origin::tuned;
    if (candidates.size() < 2) return choice;
    const double first = cost_(candidates.front());
    choice.default_seconds = choice.seconds = first;
    std::vector<Timed> timed = those_with_time(candidates);
    if (timed.size() < 2) return choice;
    const Timed* best = take_turns(timed);
    if (!best) return choice;
    Timed standing{timed.front().configuration, {}}, rival{best->configuration, {}};
    const bool wins = compare(standing, rival);
    if (!standing.costs.empty()) choice.default_seconds = median(standing.costs);
    choice.seconds = choice.default_seconds;
    if (!wins) return choice;
    choice.configuration = rival.configuration;
    choice.seconds = median(rival.costs);
    return choice;
  }

 private:
  // The share of the whole time; the rest is for the comparison.
  static constexpr double kShareOfTurns = 0.6;
  // After some turns, a candidate that costs this much more than the default is left out.
  static constexpr double kHopeless = 1.25;
  static constexpr std::size_t kTurnsBefore = 2, kLeastTurns = 3, kLeastOfComparison = 5;
  // A smaller gain does not count.
  static constexpr double kLeastGain = 0.01;

  double elapsed() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  /// As many as can be timed, after one run of each that is not.
  std::vector<Timed> those_with_time(const std::vector<Configuration>& candidates) const {
    const double one_run = elapsed();  // of the default, before anything was warm
    const double runs = kShareOfTurns * limits_.seconds / std::max(one_run, 1e-9) - 1;
    const double most = runs / static_cast<double>(kLeastTurns + 1);
    std::vector<Timed> timed;
    for (const Configuration& candidate : candidates)
      if (static_cast<double>(timed.size()) < most) timed.push_back({candidate, {}});
    return timed;
  }

  /// The candidate of the least median; null where that is the default.
  const Timed* take_turns(std::vector<Timed>& timed) {
    const double end = kShareOfTurns * limits_.seconds;
    for (int i = 0; i < limits_.warmup_steps; ++i)
      for (const Timed& t : timed)
        if (i == 0 || elapsed() < end / 4) cost_(t.configuration);
    const auto turns = static_cast<std::size_t>(std::max(limits_.steps, 1));
    for (std::size_t turn = 0; turn < turns; ++turn) {
      if (turn >= kLeastTurns && elapsed() > end) break;
      for (std::size_t i = 0; i < timed.size(); ++i) {
        Timed& t = timed[(i + turn) % timed.size()];
        const bool is_out =
            turn >= kTurnsBefore && median(t.costs) > kHopeless * median(timed.front().costs);
        if (!is_out) t.costs.push_back(cost_(t.configuration));
        if (elapsed() > limits_.seconds) return nullptr;
      }
    }
    const Timed* best = &timed.front();
    for (const Timed& t : timed)
      if (median(t.costs) < median(best->costs)) best = &t;
    return best == &timed.front() ? nullptr : best;
  }

  /// Whether the rival beats the one that stands, in new turns of the two alone: the least of many
  /// costs may be small by chance.
  bool compare(Timed& standing, Timed& rival) {
    const auto turns = static_cast<std::size_t>(2 * std::max(limits_.steps, 1) + 1);
    std::size_t wins = 0, count = 0;
    for (; count < std::max(turns, kLeastOfComparison) && elapsed() < limits_.seconds; ++count) {
      Timed* order[] = {&standing, &rival};
      if (count % 2 == 1) std::swap(order[0], order[1]);
      for (Timed* t : order) t->costs.push_back(cost_(t->configuration));
      wins += rival.costs.back() < standing.costs.back();
    }
    if (count < kLeastOfComparison) return false;
    const double before = median(standing.costs);
    const double noise = std::max(2 * deviation(standing.costs), kLeastGain * before);
    // The least costs are those of a machine that did nothing else: where others took turns on it,
    // a rival that only suffers less from them has the smaller median, but not the smaller least.
    return before - median(rival.costs) > noise && 4 * wins >= 3 * count &&
           least(rival.costs) < least(standing.costs);
  }

  const std::function<double(const Configuration&)>& cost_;
  const TuningLimits limits_;
  const Clock::time_point start_ = Clock::now();
};

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

TuningSettings settings_of_environment() {
  TuningSettings settings;
  settings.cache_dir = environment("NATTEN_CACHE_DIR");
  const std::string file = environment("NATTEN_TUNE_FILE"), mode = environment("NATTEN_TUNE");
  if (!file.empty()) settings.record_file = file;
  const std::pair<const char*, TuningMode> modes[] = {{"", TuningMode::off},
                                                      {"off", TuningMode::off},
                                                      {"read", TuningMode::read},
                                                      {"record", TuningMode::record},
                                                      {"tune", TuningMode::tune}};
  for (const auto& [name, value] : modes)
    if (mode == name) {
      settings.forward = settings.backward = value;
      return settings;
    }
  throw Error(ErrorKind::invalid_value,
              "NATTEN_TUNE: got \"" + mode + "\"; must be off, read, record or tune");
}

/// The one tuner of the process.
class Tuner {
 public:
  static Tuner& get() {
    static Tuner tuner;
    return tuner;
  }

  TuningMode mode(Op op) const {
    return (op == Op::attention_backward ? backward_ : forward_).load(std::memory_order_relaxed);
  }
  TuningSettings settings() const {
    const std::lock_guard lock(mutex_);
    return settings_;
  }
  void set(const TuningSettings& settings) {
    const std::lock_guard lock(mutex_);
    if (settings.cache_dir != settings_.cache_dir) cache_.reset(settings.cache_dir);
    if (settings.record_file != settings_.record_file) recorded_.clear();
    settings_ = settings;
    forward_ = settings.forward;
    backward_ = settings.backward;
  }

  TuningCache& cache() { return cache_; }
  std::mutex& timing() { return timing_; }

  /// Appends a problem to the file, if it is the first time.
  void record(const Problem& problem, int threads) {
    const std::string text = to_text(problem);
    const std::lock_guard lock(mutex_);
    if (!recorded_.insert(text).second) return;
    const std::string line = std::string("{\"natten\": \"") + version() +
                             "\", \"threads\": " + std::to_string(threads) + ", \"problem\": \"" +
                             text + "\"}\n";
    // One write to the end, so that lines of many processes do not mix.
    std::FILE* file = std::fopen(settings_.record_file.c_str(), "ab");
    const bool is_written = file && std::fwrite(line.data(), 1, line.size(), file) == line.size();
    if ((!file || std::fclose(file) != 0 || !is_written) && !std::exchange(told_, true))
      detail::note(true, "record file \"" + settings_.record_file + "\": cannot be written");
  }

 private:
  Tuner() { set(settings_of_environment()); }

  mutable std::mutex mutex_;
  std::mutex timing_;  // one search at a time
  TuningSettings settings_;
  std::atomic<TuningMode> forward_{TuningMode::off}, backward_{TuningMode::off};
  TuningCache cache_;
  std::set<std::string> recorded_;
  bool told_ = false;
};

int threads_of(const Problem& problem, const Context& context) {
  if (problem.device.type != DeviceType::cpu) return 0;
  return context.executor ? context.executor->concurrency() : num_threads();
}

std::optional<Choice> find(const Problem& problem, const detail::Backend& backend, int threads) {
  const Machine machine{backend.tunable->machine(problem), threads};
  const auto accepts = [&](const Configuration& configuration) {
    const std::vector<Configuration> offered = backend.tunable->candidates(problem, threads, true);
    return std::find(offered.begin(), offered.end(), configuration) != offered.end();
  };
  // By reference, so that no memory is taken for it in each call.
  return Tuner::get().cache().find(problem, backend.name, machine, std::cref(accepts));
}

void set(detail::Job& job, const Configuration& configuration) {
  job.configuration = configuration;
  if (configuration.query_tile.size > 0) job.problem.query_tile = configuration.query_tile;
  if (configuration.key_tile.size > 0) job.problem.key_tile = configuration.key_tile;
}

/// Times the candidates on a job's own tensors, and stores the choice.
Choice search_and_store(const detail::Job& job, const detail::Backend& backend,
                        const Context& context, int threads, const TuningLimits& limits) {
  const std::vector<Configuration> offered =
      backend.tunable->candidates(job.problem, threads, limits.thorough);
  const auto cost = [&](const Configuration& configuration) {
    std::vector<detail::Job> jobs{job};
    set(jobs[0], configuration);
    return backend.tunable->seconds(
        job.problem, [&] { backend.run(jobs, context); }, context);
  };
  const Choice choice = search(offered, cost, limits);
  Tuner::get().cache().store(job.problem, backend.name,
                             {backend.tunable->machine(job.problem), threads}, choice);
  return choice;
}

std::mutex& notes_mutex() {
  static std::mutex mutex;
  return mutex;
}
std::deque<TuningNote>& notes() {
  static std::deque<TuningNote> kept;
  return kept;
}

/// Memory for a tensor, with numbers of some size.
class Memory {
 public:
  Memory(TensorView& view, bool is_mask) {
    const auto count = static_cast<std::size_t>(view.size());
    bytes_.resize(count * size_of(view.dtype) + kAlignment);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    view.data = bytes_.data() + (kAlignment - address % kAlignment) % kAlignment;
    if (is_mask) {
      std::fill_n(static_cast<char*>(view.data), count, char{1});
      return;
    }
    detail::dispatch_dtype(view.dtype, [&](auto type) {
      fill(static_cast<typename decltype(type)::type*>(view.data), count);
    });
  }

 private:
  static constexpr std::size_t kAlignment = 64;

  /// From -1 to 1, in an order that a processor cannot guess.
  template <class T>
  static void fill(T* to, std::size_t count) {
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      to[i] = static_cast<T>(static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f);
    }
  }

  std::vector<char> bytes_;
};

}  // namespace

const char* name_of(Origin origin) {
  switch (origin) {
    case Origin::default_choice: return "default";
    case Origin::tuned: return "tuned";
    case Origin::cache: return "cache";
  }
  return "unknown";
}

std::vector<Configuration> candidates(const Problem& problem, int threads, bool thorough,
                                      const Context& context) {
  const detail::Backend& backend = detail::select(problem, context);
  if (!backend.tunable) return std::vector<Configuration>(1);
  return backend.tunable->candidates(problem, threads, thorough);
}

Machine machine_of(const Problem& problem, const Context& context) {
  const detail::Backend& backend = detail::select(problem, context);
  return {backend.tunable ? backend.tunable->machine(problem) : std::string_view(),
          threads_of(problem, context)};
}

Choice search(const std::vector<Configuration>& candidates,
              const std::function<double(const Configuration&)>& cost, const TuningLimits& limits) {
  return Search(cost, limits).run(candidates);
}

TuningSettings tuning_settings() { return Tuner::get().settings(); }
void set_tuning_settings(const TuningSettings& settings) { Tuner::get().set(settings); }

Choice choice_for(const Problem& problem, const Context& context) {
  const detail::Backend& backend = detail::select(problem, context);
  const TuningMode mode = Tuner::get().mode(problem.op);
  if (!backend.tunable || mode == TuningMode::off || mode == TuningMode::record) return {};
  return find(problem, backend, threads_of(problem, context)).value_or(Choice());
}

Choice tune(const Problem& problem, const Context& context) {
  if (problem.device.type != DeviceType::cpu)
    throw Error(ErrorKind::invalid_value,
                std::string("device: got ") + name_of(problem.device.type) +
                    "; must be cpu: problems of other devices are tuned by calls");
  const detail::Backend& backend = detail::select(problem, context);
  if (!backend.tunable) return {};
  detail::Job job{problem, detail::call_of(problem).tensors, nullptr};
  std::vector<Memory> memory;
  for (const Role& role : roles_of(problem.op))
    if (TensorView& view = job.tensors.*role.tensor) memory.emplace_back(view, role.is_mask);
  const auto count =
      static_cast<std::int64_t>(backend.workspace_bytes(problem) / sizeof(double) + 1);
  TensorView workspace = contiguous_view(nullptr, DType::float64, {}, &count, 1);
  memory.emplace_back(workspace, false);
  job.workspace = workspace.data;
  const TuningSettings settings = tuning_settings();
  const std::lock_guard lock(Tuner::get().timing());
  return search_and_store(
      job, backend, context, threads_of(problem, context),
      problem.op == Op::attention_backward ? settings.backward_limits : settings.forward_limits);
}

std::vector<TuningNote> take_tuning_notes() {
  const std::lock_guard lock(notes_mutex());
  std::vector<TuningNote> taken(notes().begin(), notes().end());
  notes().clear();
  return taken;
}

namespace detail {

void note(bool is_warning, const std::string& text) {
  constexpr std::size_t kMost = 100;
  const std::lock_guard lock(notes_mutex());
  if (notes().size() == kMost) notes().pop_front();
  notes().push_back({is_warning, text});
}

void configure(Job& job, const Backend& backend, const Context& context, Tuning allowed,
               bool can_time) {
  Tuner& tuner = Tuner::get();
  const TuningMode mode = tuner.mode(job.problem.op);
  if (mode == TuningMode::off || allowed == Tuning::none || !backend.tunable) return;
  const int threads = threads_of(job.problem, context);
  if (mode == TuningMode::record) return tuner.record(job.problem, threads);
  std::optional<Choice> choice = find(job.problem, backend, threads);
  if (!choice && mode == TuningMode::tune && allowed == Tuning::any && can_time &&
      backend.tunable->can_time(context)) {
    // While another thread tunes, times would be wrong.
    const std::unique_lock lock(tuner.timing(), std::try_to_lock);
    if (lock) {
      const TuningSettings settings = tuner.settings();
      choice = search_and_store(job, backend, context, threads,
                                job.problem.op == Op::attention_backward ? settings.backward_limits
                                                                         : settings.forward_limits);
    }
  }
  if (choice) set(job, choice->configuration);
}

}  // namespace detail
}  // namespace natten
