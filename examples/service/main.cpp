// service BUNDLE [--name NAME] [--host H] [--port P] [--api-key KEY] [--sessions N] [--queue N] [--context N]
//         [--threads N] [--deadline S] [--time-limit S] [--backend ort|cuda|trt]
//
// OpenAI's protocol (docs/reference/openai-api.md): /v1/models, /v1/completions, /v1/chat/completions; /health, /metrics.
// The API key may also be in the environment, as COATRT_API_KEY, where other users do not see it.
#include <charconv>
#include <coatrt/coatrt.hpp>
#include <csignal>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <set>

#include "service.hpp"

namespace {

/// The value of an option that takes a whole number.
template <class Number>
void read_number(const std::string& name, const std::string& text, long least, long most, Number& number) {
  long value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
    throw coatrt::Error(name + " must be a whole number from " + std::to_string(least) + " to " + std::to_string(most) +
                        ", got " + text);
  number = static_cast<Number>(value);
}

Options parse(int argc, char** argv) {
  Options options;
  options.session.threads = 1;  // with more, ONNX Runtime divides small products otherwise for other numbers of rows
  if (const char* key = std::getenv("COATRT_API_KEY")) options.api_key = key;
  std::set<std::string> given;
  long deadline = options.deadline.count(), time_limit = options.time_limit.count();
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.compare(0, 2, "--") != 0) {
      if (!options.bundle.empty()) throw coatrt::Error("two bundles are given, " + options.bundle + " and " + name + "; give one");
      options.bundle = name;
      continue;
    }
    if (++i == argc) throw coatrt::Error(name + " has no value; give one");
    const std::string value = argv[i];
    if (!given.insert(name).second) throw coatrt::Error(name + " is given twice; give it once");
    if (name == "--host") options.host = value;
    else if (name == "--port") read_number(name, value, 0, 65535, options.port);
    else if (name == "--sessions") read_number(name, value, 1, 1024, options.sessions);
    else if (name == "--queue") read_number(name, value, 0, 10000, options.queue);
    else if (name == "--threads") read_number(name, value, 0, 1024, options.session.threads);
    else if (name == "--context") read_number(name, value, 1, 1L << 30, options.session.context);
    else if (name == "--time-limit") read_number(name, value, 1, 86400, time_limit);
    else if (name == "--name") options.name = value;
    else if (name == "--api-key") options.api_key = value;
    else if (name == "--deadline") read_number(name, value, 1, 3600, deadline);
    else if (name == "--backend") options.session.backend = value;
    else throw coatrt::Error(name + " is no option; see the head of main.cpp");
  }
  options.deadline = std::chrono::seconds(deadline);
  options.time_limit = std::chrono::seconds(time_limit);
  if (given.count("--api-key") != 0 && options.api_key.empty()) throw coatrt::Error("--api-key must not be empty");
  if (options.bundle.empty()) throw coatrt::Error("usage: service BUNDLE [--port 8080] [--sessions 8]");
  if (options.name.empty()) options.name = std::filesystem::absolute(options.bundle + "/.").parent_path().filename().string();
  return options;
}

/// Ends the process on SIGTERM or SIGINT: cleanly within `kPatience`, after that at once. Loading a model and reading a
/// prompt cannot be interrupted.
class Ending {
 public:
  static constexpr std::chrono::seconds kPatience{4};

  Ending() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    sigaddset(&signals_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);  // before any thread starts, so that only this one gets them
    thread_ = std::thread([this] { run(); });
  }
  /// Ends the wait without a signal.
  ~Ending() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    pthread_kill(thread_.native_handle(), SIGTERM);
    thread_.join();
  }
  Ending(const Ending&) = delete;
  Ending& operator=(const Ending&) = delete;

  /// The service to stop, at once if the signal has come already; null once it is gone.
  void watch(Service* service) {
    const std::lock_guard lock(mutex_);
    service_ = service;
    if (told_ && service_ != nullptr) service_->stop();
  }

 private:
  void run() {
    int signal = 0;
    sigwait(&signals_, &signal);
    std::unique_lock lock(mutex_);
    told_ = true;
    if (service_ != nullptr) service_->stop();
    if (!changed_.wait_for(lock, kPatience, [&] { return over_; })) std::_Exit(0);
  }

  sigset_t signals_{};
  std::mutex mutex_;
  std::condition_variable changed_;
  Service* service_ = nullptr;
  bool told_ = false, over_ = false;
  std::thread thread_;
};

int serve(const Options& options, Ending& ending) {
  Service service(options);
  if (!service.server().bind(options.host, options.port)) {
    std::cerr << "service: " << options.host << ":" << options.port << " cannot be listened on; choose another port\n";
    return 2;
  }
  ending.watch(&service);
  std::cerr << "listening on http://" << options.host << ":" << service.server().port() << std::endl;
  service.server().serve();
  ending.watch(nullptr);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  Ending ending;
  return serve(options, ending);
} catch (const coatrt::Error& error) {
  std::cerr << "service: " << error.what() << "\n";
  return 2;
}
