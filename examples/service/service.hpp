#pragma once
#include <coatrt/coatrt.hpp>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "load.hpp"
#include "metrics.hpp"
#include "pool.hpp"
#include "request.hpp"
#include "server.hpp"

/// Options of the service.
struct Options {
  std::string bundle, name, host = "127.0.0.1", api_key;
  int port = 8080;
  std::size_t sessions = 8, queue = 64;
  std::chrono::seconds deadline{10}, time_limit{600};
  coatrt::SessionOptions session;
};

/// A bundle's model behind OpenAI's protocol. One thread serves connections, some read requests, one runs the model.
class Service {
 public:
  explicit Service(const Options& options)
      : options_(options),
        bundle_(coatrt::Bundle::open(options.bundle)),
        tokenizer_(bundle_),
        chat_(bundle_),
        lora_(bundle_.lora()),
        loras_(bundle_),
        load_(options.sessions + options.queue),
        server_([this](HttpRequest&& request, const std::shared_ptr<Reply>& reply) { route(std::move(request), reply); },
                kConnections + options.sessions + options.queue, options.deadline),
        engine_(coatrt::Batch(bundle_, options.sessions, quiet(options.session)), tokenizer_, bundle_.stop_tokens(),
                options.time_limit, metrics_),
        readers_(kReaders, [this](Job& job) { read(job); }, [this](Job& job) { fail(job, stopping()); }) {}

  Server& server() { return server_; }
  /// Refuse waiting requests and finish running ones for a while.
  void stop() {
    stopping_ = true;
    server_.stop();
    engine_.stop(kPatience);
    readers_.close();
  }

 private:
  using Job = Workers::Job;
  static constexpr std::size_t kConnections = 512;  // in addition to those with a running request
  static constexpr std::size_t kReaders = 2;        // threads that parse and tokenize
  static constexpr std::chrono::milliseconds kPatience{1500};  // less than Server::kGrace, so that refusals arrive

  static coatrt::SessionOptions quiet(coatrt::SessionOptions session) {
    session.notice = [](const std::string&) {};  // clients choose the LoRA of another configuration on purpose
    return session;
  }
  static double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
  static ApiError stopping() { return {503, "the server ends", "", "stopping"}; }
  static void answer(Reply& reply, int status, const Json& value, std::string_view headers = "") {
    reply.answer(status, "application/json", dump(value) + "\n", headers);
  }

  /// Whether texts are equal, in a time that depends on the first one's length only.
  static bool equal(const std::string& given, const std::string& secret) {
    unsigned char differ = given.size() == secret.size() ? 0 : 1;
    for (std::size_t i = 0; i < given.size(); ++i)
      differ = static_cast<unsigned char>(differ | (given[i] ^ secret[i % secret.size()]));
    return differ == 0;
  }

  /// On the server's thread.
  void route(HttpRequest&& request, const std::shared_ptr<Reply>& reply) {
    const bool v1 = request.path.compare(0, 4, "/v1/") == 0;
    try {
      if (v1 && !options_.api_key.empty() && !equal(request.authorization, "Bearer " + options_.api_key))
        throw ApiError{401, "the API key is missing or wrong; send the header Authorization: Bearer KEY", "", "invalid_api_key"};
      const bool models = request.path == "/v1/models" || request.path.compare(0, 11, "/v1/models/") == 0;
      const bool chat = request.path == "/v1/chat/completions", generation = chat || request.path == "/v1/completions";
      const bool health = request.path == "/health", metrics = request.path == "/metrics";
      if (!models && !generation && !health && !metrics)
        throw ApiError{404, "there is no such path; there are /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics", "", ""};
      const std::string method = generation ? "POST" : "GET";
      if (request.method != method) throw ApiError{405, "use " + method, "", ""};
      if (generation) return queue(std::move(request), reply);
      if (v1) {
        const Json found = request.path == "/v1/models" ? list() : model(request.path.substr(11));
        metrics_.request(200);
        answer(*reply, 200, found);
      } else if (metrics) {
        const auto [running, waiting] = load_.running_and_waiting();
        reply->answer(200, "text/plain; version=0.0.4", metrics_.text(running, waiting));
      } else {
        answer(*reply, stopping_ ? 503 : 200, {{"status", stopping_ ? "stopping" : "ok"}});
      }
    } catch (const ApiError& error) {
      if (v1) metrics_.request(error.status);
      const bool post = request.path == "/v1/completions" || request.path == "/v1/chat/completions";
      answer(*reply, error.status, error.json(),
             error.status == 405   ? (post ? "Allow: POST\r\n" : "Allow: GET\r\n")
             : error.status == 401 ? "WWW-Authenticate: Bearer\r\n"
             : error.status == 503 ? "Retry-After: 1\r\n"
                                   : "");
    }
  }

  void queue(HttpRequest&& request, const std::shared_ptr<Reply>& reply) {
    if (request.content_type != "application/json")
      throw ApiError{415, "the content type must be application/json", "", ""};
    if (request.query.size() > 1)
      throw ApiError{400, "the path has a query, which is not read; give its fields in the JSON object", "", ""};
    if (stopping_) throw stopping();
    auto ticket = load_.enter();
    if (!ticket) {
      readers_.drop_gone();
      ticket = load_.enter();
    }
    if (!ticket) throw ApiError{503, "too many requests wait; try again later", "", "queue_full"};
    readers_.add({std::move(request), reply, std::move(*ticket)});
  }

  Json entry(const std::string& id) const {
    return {{"id", id}, {"object", "model"}, {"created", started_}, {"owned_by", "coatrt"}};
  }
  Json list() const {
    return {{"object", "list"}, {"data", Json::array({entry(options_.name), entry(options_.name + ":base")})}};
  }
  Json model(const std::string& escaped) const {
    const std::string id = unescaped(escaped);
    check_model(id);
    return entry(id);
  }
  void check_model(const std::string& id) const {
    if (id == options_.name || id == options_.name + ":base") return;
    throw ApiError{404, "there is no model " + shown(Json(id)) + "; there are " + options_.name + " and " + options_.name + ":base",
                   "model", "model_not_found"};
  }
  static std::string unescaped(const std::string& path) {
    const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1; };
    std::string made;
    for (std::size_t i = 0; i < path.size(); ++i) {
      const bool escape = path[i] == '%' && i + 2 < path.size() && digit(path[i + 1]) >= 0 && digit(path[i + 2]) >= 0;
      made += escape ? static_cast<char>(digit(path[i + 1]) * 16 + digit(path[i + 2])) : path[i];
      if (escape) i += 2;
    }
    return made;
  }

  void fail(Job& job, const ApiError& error) {
    job.ticket.leave();
    metrics_.request(error.status);
    metrics_.generation(since(job.start));
    answer(*job.reply, error.status, error.json(), error.status == 503 ? "Retry-After: 1\r\n" : "");
  }

  /// Make a task of a request, on a reader's thread.
  void read(Job& job) {
    try {
      engine_.submit(task(job));
    } catch (const ApiError& error) {
      fail(job, error);
    } catch (const std::exception& error) {
      std::cerr << "service: a request failed: " << error.what() << std::endl;
      fail(job, {500, "the server failed; the cause is in its log", "", ""});
    }
  }

  std::unique_ptr<Task> task(Job& job) {
    ApiRequest request(job.request.body, job.request.path == "/v1/chat/completions");
    check_model(request.model);
    const bool base = request.model != options_.name;
    if (base && !request.configuration.empty())
      throw ApiError{400, "configuration chooses a LoRA, and " + request.model + " has none; name the model " + options_.name,
                     "configuration", ""};
    auto prompts = request.chat ? std::vector<std::vector<std::int64_t>>{conversation(request)} : tokens_of(request);
    check_context(request, prompts);
    for (const auto& [token, bias] : request.sampling.logit_bias)
      if (token >= engine_.vocabulary())
        throw ApiError{400, "logit_bias names token " + std::to_string(token) + "; token ids are below " + std::to_string(engine_.vocabulary()),
                       "logit_bias", ""};
    auto [key, lora] = lora_of(request, base);
    const std::size_t choices = prompts.size() * request.n;
    Answer answer(request, choices, tokenizer_, job.reply);
    return std::unique_ptr<Task>(new Task{std::move(request), std::move(prompts), std::move(key), std::move(lora),
                                          std::move(answer), std::move(job.ticket), job.start});
  }

  std::pair<std::string, std::optional<coatrt::Lora>> lora_of(const ApiRequest& request, bool base) {
    if (base) return {"base", std::nullopt};
    if (request.configuration.empty()) return {"own", lora_};
    try {
      const coatrt::Configuration configuration = bundle_.configuration(request.configuration, "configuration");
      const std::string hash = configuration.hash();
      return {hash, loras_.of(configuration, hash)};
    } catch (const coatrt::Error& error) {
      throw ApiError{400, error.what(), "configuration", ""};
    }
  }

  std::vector<std::vector<std::int64_t>> tokens_of(const ApiRequest& request) {
    std::vector<std::vector<std::int64_t>> made;
    for (const Prompt& prompt : request.prompts) {
      made.push_back(prompt.tokens.empty() ? encode(prompt.text, true, "prompt") : prompt.tokens);
      if (made.back().empty()) throw ApiError{400, "prompt has no tokens; give some text", "prompt", ""};
      for (const std::int64_t token : made.back())
        if (token >= engine_.vocabulary())
          throw ApiError{400, "prompt has token " + std::to_string(token) + "; token ids are below " + std::to_string(engine_.vocabulary()),
                         "prompt", ""};
    }
    return made;
  }

  std::vector<std::int64_t> conversation(const ApiRequest& request) {
    if (!chat_) throw ApiError{400, "the model has no chat template; use /v1/completions", "messages", "no_chat_template"};
    std::string text;
    try {
      text = chat_.render(request.messages);
    } catch (const coatrt::Error& error) {
      throw ApiError{400, error.what(), "messages", chat_.renders() ? "" : "no_chat_template"};
    }
    auto tokens = encode(text, false, "messages");
    if (tokens.empty()) throw ApiError{400, "messages have no tokens; give some text", "messages", ""};
    return tokens;
  }

  std::vector<std::int64_t> encode(const std::string& text, bool special, const char* param) const {
    try {
      return tokenizer_.encode(text, special);
    } catch (const coatrt::Error& error) {
      throw ApiError{400, error.what(), param, ""};
    }
  }

  /// Fill in `max_tokens`, and refuse what does not fit the context.
  void check_context(ApiRequest& request, const std::vector<std::vector<std::int64_t>>& prompts) const {
    const std::int64_t most = engine_.capacity();
    if (!request.max_tokens && !request.chat) request.max_tokens = 16;
    for (const auto& prompt : prompts) {
      const auto length = static_cast<std::int64_t>(prompt.size());
      const std::int64_t wanted = request.max_tokens.value_or(1);
      if (length < most && wanted <= most - length) continue;
      const std::string what = "the prompt has " + std::to_string(length) + " tokens and max_tokens is " + std::to_string(wanted) + ", ";
      const std::string limit = std::to_string(most);
      throw ApiError{400,
                     what + (engine_.limit() == coatrt::Limit::context
                                 ? "the service runs with --context " + limit + "; shorten them, or have the service started with more"
                                 : "the bundle was built for " + limit + "; shorten them, or have it built with more (--context)"),
                     request.chat ? "messages" : "prompt", "context_length_exceeded"};
    }
  }

  const Options options_;
  const std::int64_t started_ = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  coatrt::Bundle bundle_;
  coatrt::Tokenizer tokenizer_;
  coatrt::ChatTemplate chat_;
  coatrt::Lora lora_;
  Loras loras_;
  Metrics metrics_;
  Load load_;
  std::atomic<bool> stopping_{false};
  Server server_;
  Engine engine_;
  Workers readers_;  // last, so that its threads end first
};
