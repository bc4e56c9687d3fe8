#pragma once
#include <coatrt/coatrt.hpp>
#include <string>
#include <utility>
#include <vector>

#include "metrics.hpp"
#include "pool.hpp"
#include "request.hpp"
#include "server.hpp"

/// Options of the service.
struct Options {
  std::string bundle, host = "127.0.0.1";
  int port = 8080;
  std::size_t sessions = std::max(1U, std::thread::hardware_concurrency()), queue = 64;
  std::chrono::seconds deadline{10};
  coatrt::SessionOptions session;
};

/// A bundle's model behind HTTP. One thread serves connections, /health and /metrics, one for each session generates, one
/// changes the default configuration.
class Service {
 public:
  explicit Service(const Options& options)
      : bundle_(coatrt::Bundle::open(options.bundle)),
        tokenizer_(bundle_),
        loras_(bundle_),
        slots_(make_slots(bundle_, options)),
        configuration_(std::make_shared<const coatrt::Configuration>(bundle_.configuration())),
        hash_(configuration_->hash()),
        server_([this](HttpRequest&& request, const std::shared_ptr<Reply>& reply) { route(std::move(request), reply); },
                kConnections + options.sessions + options.queue, options.deadline),
        generating_(options.sessions, options.queue,
                    guarded([this](std::size_t thread, Job& job) { generate(slots_[thread], job); }),
                    [this](Job& job) { refuse(job); }),
        configuring_(1, kConfigurationsWaiting, guarded([this](std::size_t, Job& job) { configure(job); }),
                     [this](Job& job) { refuse(job); }) {}

  Server& server() { return server_; }
  /// Refuse queued requests and finish running ones for at most `Server::kGrace`.
  void stop() {
    server_.stop();
    generating_.close();
    configuring_.close();
  }

 private:
  using Job = Workers::Job;
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kConnections = 512;  // in addition to those with a running request
  static constexpr std::size_t kConfigurationsWaiting = 8;
  static constexpr std::size_t kLongestMessage = 1000;  // messages may quote the client

  /// A session and the configuration of its current LoRA.
  struct Slot {
    coatrt::Session session;
    std::string bound;
  };

  static std::vector<Slot> make_slots(const coatrt::Bundle& bundle, const Options& options) {
    std::vector<Slot> slots;
    coatrt::SessionOptions session = options.session;
    session.notice = [](const std::string&) {};  // clients choose the LoRA of another configuration on purpose
    for (std::size_t i = 0; i < options.sessions; ++i) slots.push_back({coatrt::Session(bundle, session), ""});
    return slots;
  }

  static double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
  static std::string dump(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }
  static void answer(Reply& reply, int status, const Json& value) {
    reply.answer(status, "application/json", dump(value) + "\n");
  }

  /// On the server's thread.
  void route(HttpRequest&& request, const std::shared_ptr<Reply>& reply) {
    const bool get = request.path == "/health" || request.path == "/metrics";
    const bool post = request.path == "/generate" || request.path == "/configuration";
    if (!get && !post)
      return answer(*reply, 404, {{"error", "no such path; there are /generate, /configuration, /health, /metrics"}});
    if (request.method != (get ? "GET" : "POST"))
      return answer(*reply, 405, {{"error", std::string("use ") + (get ? "GET" : "POST")}});
    if (post && request.query.size() > 1)
      return answer(*reply, 400, {{"error", "the path has a query, which is not read; give its fields in the JSON object"}});
    if (request.path == "/metrics")
      return reply->answer(200, "text/plain; version=0.0.4", metrics_.text(generating_.busy(), generating_.waiting()));
    if (request.path == "/health") return answer(*reply, 200, {{"status", "ok"}, {"configuration", configuration().second}});
    Workers& workers = request.path == "/generate" ? generating_ : configuring_;
    Job job{std::move(request), reply};
    if (!workers.offer(job)) refuse(job);
  }

  void refuse(Job& job) {
    answer(*job.reply, 503, {{"error", "too many requests wait, or the service ends; try again later"}});
    metrics_.request(503, since(job.start));
  }

  /// Errors become one JSON line: 400 for invalid requests, 500 for the rest.
  Workers::Work guarded(Workers::Work work) {
    const auto fail = [this](Job& job, int status, const std::string& message) {
      answer(*job.reply, status, {{"error", message.substr(0, kLongestMessage)}});
      metrics_.request(status, since(job.start));
    };
    return [work, fail](std::size_t thread, Job& job) {
      try {
        work(thread, job);
      } catch (const coatrt::Error& error) {
        fail(job, 400, error.what());
      } catch (const std::exception& error) {
        fail(job, 500, std::string("the service failed (") + error.what() + "); try again, or tell who runs it");
      }
    };
  }

  /// The default, and its hash.
  std::pair<std::shared_ptr<const coatrt::Configuration>, std::string> configuration() {
    const std::lock_guard lock(mutex_);
    return {configuration_, hash_};
  }

  void configure(Job& job) {
    parse_json(job.request.body, R"({"default": "int8"})");  // checks the limits for untrusted JSON first
    auto configuration =
        std::make_shared<const coatrt::Configuration>(bundle_.configuration(job.request.body, "configuration"));
    const std::string hash = configuration->hash();
    const auto start = Clock::now();
    loras_.of(*configuration, hash);  // emitted before it becomes the default, so that no request waits for it
    const double seconds = since(start);
    {
      const std::lock_guard lock(mutex_);
      configuration_ = std::move(configuration);
      hash_ = hash;
    }
    answer(*job.reply, 200, {{"configuration", hash}, {"emitted_ms", seconds * 1e3}});
    metrics_.request(200, since(job.start));
  }

  static void check_length(std::size_t tokens, const coatrt::Session& session) {
    const auto most = static_cast<std::size_t>(session.capacity());
    if (tokens <= most) return;
    const std::string limit = std::to_string(most), what = "the prompt has " + std::to_string(tokens) + " tokens and ";
    if (session.limit() == coatrt::Limit::context)
      throw coatrt::Error(what + "the service runs with --context " + limit +
                          "; shorten it, or have the service started with more");
    throw coatrt::Error(what + "the bundle was built for " + limit + "; shorten it, or have it built with more (--context)");
  }

  void generate(Slot& slot, Job& job) {
    GenerateRequest request(job.request.body);
    auto [configuration, hash] = this->configuration();
    if (!request.configuration.empty()) {
      configuration = std::make_shared<const coatrt::Configuration>(
          bundle_.configuration(request.configuration, "configuration"));
      hash = configuration->hash();
    }
    if (request.prompt) request.tokens = tokenizer_.encode(*request.prompt);
    check_length(request.tokens.size(), slot.session);
    const auto start = Clock::now();
    if (slot.bound != hash) {
      slot.bound.clear();
      slot.session.swap(loras_.of(*configuration, hash));
      slot.bound = hash;
      metrics_.swap(since(start));
    }
    coatrt::TextStream text(tokenizer_);
    Reply& reply = *job.reply;
    bool first = true;
    const auto event = [&](const Json& value) { reply.part("data: " + dump(value) + "\n\n"); };
    int status = 200;
    try {
      const auto each = [&](std::int64_t token) {
        if (std::exchange(first, false)) {
          metrics_.first_token(since(start));
          if (request.stream) reply.begin("text/event-stream");
        }
        if (request.stream) event({{"text", text.add(token)}, {"token", token}});
        return !reply.gone();
      };
      const auto made = slot.session.generate(request.tokens, request.max_tokens, request.sampling, each);
      metrics_.tokens(made.tokens.size());
      Json last{{"tokens", made.tokens}, {"text", tokenizer_.decode(made.tokens)}};
      last["reason"] = made.reason;
      last["configuration"] = hash;
      if (!request.stream) {
        answer(reply, 200, last);
      } else {
        if (first) reply.begin("text/event-stream");  // the model stopped without a token
        last["done"] = true;
        event(last);
        reply.end();
      }
    } catch (const std::exception& error) {
      if (!request.stream || first) throw;
      status = 500;  // the status line is sent already
      event({{"error", std::string(error.what()).substr(0, kLongestMessage)}});
      reply.end();
    }
    metrics_.request(status, since(job.start));
  }

  coatrt::Bundle bundle_;
  coatrt::Tokenizer tokenizer_;
  Loras loras_;
  std::vector<Slot> slots_;
  std::mutex mutex_;  // of the default configuration
  std::shared_ptr<const coatrt::Configuration> configuration_;
  std::string hash_;
  Metrics metrics_;
  Server server_;
  Workers generating_, configuring_;  // last, so that their threads end first
};
