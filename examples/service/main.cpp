// service BUNDLE [--host H] [--port P] [--sessions N] [--threads N] [--context N] [--queue N] [--backend ort|trt]
//
// POST /generate       {"prompt": text | "tokens": [ids], "max_tokens", "temperature", "top_k", "top_p", "seed",
//                       "configuration": {…}, "stream": true} → JSON, or server-sent events of {"text", "token"}
// POST /configuration  {"default": "int8", …}: the LoRA of requests that name none
// GET /health, /metrics
#include <coatrt/coatrt.hpp>
#include <httplib.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "metrics.hpp"
#include "pool.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Text is valid UTF-8 already; a message may quote what a client sent.
std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

struct Options {
  std::string bundle, host = "127.0.0.1";
  int port = 8080;
  std::size_t sessions = std::max(1U, std::thread::hardware_concurrency()), queue = 64;
  coatrt::SessionOptions session;
};

Options parse(int argc, char** argv) {
  Options options;
  options.session.threads = 1;  // requests run side by side: one core each
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.compare(0, 2, "--") != 0) {
      options.bundle = name;
      continue;
    }
    if (++i == argc) throw coatrt::Error(name + " has no value; give one");
    const std::string value = argv[i];
    try {
      if (name == "--host") options.host = value;
      else if (name == "--port") options.port = std::stoi(value);
      else if (name == "--sessions") options.sessions = std::stoul(value);
      else if (name == "--queue") options.queue = std::stoul(value);
      else if (name == "--threads") options.session.threads = std::stoi(value);
      else if (name == "--context") options.session.context = std::stoll(value);
      else if (name == "--backend") options.session.backend = value;
      else throw coatrt::Error(name + " is no option; see the head of main.cpp");
    } catch (const std::logic_error&) {
      throw coatrt::Error(name + " " + value + " is given; give a number");
    }
  }
  if (options.bundle.empty() || options.sessions < 1) throw coatrt::Error("usage: service BUNDLE [--port 8080] [--sessions 2]");
  return options;
}

struct Request {
  std::vector<std::int64_t> prompt;
  std::size_t max_tokens;
  coatrt::Sampling sampling;
  coatrt::Configuration configuration;
  std::string hash;
  bool stream;
};

class Service {
 public:
  explicit Service(const Options& options)
      : bundle_(coatrt::Bundle::open(options.bundle)),
        tokenizer_(bundle_),
        pool_(bundle_, options.session, options.sessions, options.queue),
        loras_(bundle_),
        configuration_(bundle_.configuration()) {
    server_.set_payload_max_length(1 << 20);
    server_.set_read_timeout(10);
    server_.set_write_timeout(10);
    server_.set_tcp_nodelay(true);  // a token must not wait for the next one
    const std::size_t threads = options.sessions + options.queue + 2;  // those that wait, and two for /health
    server_.new_task_queue = [threads] { return new httplib::ThreadPool(threads); };
    server_.Get("/health", [&](const httplib::Request&, httplib::Response& out) {
      const std::lock_guard lock(mutex_);
      answer(out, 200, {{"status", "ok"}, {"configuration", configuration_.hash()}});
    });
    server_.Get("/metrics", [&](const httplib::Request&, httplib::Response& out) {
      out.set_content(metrics_.text(pool_.busy(), pool_.waiting()), "text/plain; version=0.0.4");
    });
    server_.Post("/configuration", guarded([&](const httplib::Request& in, httplib::Response& out) { configure(in, out); }));
    server_.Post("/generate", guarded([&](const httplib::Request& in, httplib::Response& out) { generate(in, out); }));
  }

  bool listen(const std::string& host, int port) {
    bool served = server_.bind_to_port(host, port);
    if (served && !stopping_) {
      std::cerr << "listening on " << host << ":" << port << std::endl;
      served = server_.listen_after_bind();
    }
    ended_ = true;
    return served;
  }

  /// End `listen`, also where it has not begun: httplib forgets a stop before that.
  void stop() {
    stopping_ = true;
    while (!server_.is_running() && !ended_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    server_.stop();
  }

 private:
  using Handler = std::function<void(const httplib::Request& in, httplib::Response& out)>;

  static void answer(httplib::Response& out, int status, const json& value) {
    out.status = status;
    out.set_content(dump(value) + "\n", "application/json");
  }

  /// Errors become one JSON line: 400 for what the client got wrong, 500 for the rest.
  httplib::Server::Handler guarded(Handler handler) {
    return [this, handler](const httplib::Request& in, httplib::Response& out) {
      const auto start = Clock::now();
      try {
        handler(in, out);
      } catch (const coatrt::Error& error) {
        answer(out, 400, {{"error", error.what()}});
      } catch (const json::exception& error) {
        answer(out, 400, {{"error", error.what()}});
      } catch (const std::exception& error) {
        answer(out, 500, {{"error", error.what()}});
      }
      if (!out.body.empty()) metrics_.request(out.status, since(start));  // a stream is counted where it ends
    };
  }

  Request parse(const std::string& body) {
    const json in = json::parse(body);
    if (!in.is_object()) throw coatrt::Error("the request is no object; give {\"prompt\": …}");
    Request request{};
    if (in.contains("tokens")) request.prompt = in.at("tokens").get<std::vector<std::int64_t>>();
    else if (in.contains("prompt")) request.prompt = tokenizer_.encode(in.at("prompt").get<std::string>());
    else throw coatrt::Error("the request has neither prompt nor tokens; give one");
    const auto most = in.value("max_tokens", std::int64_t{64});
    if (most < 1) throw coatrt::Error(std::to_string(most) + " tokens are asked for; ask for at least 1");
    request.max_tokens = static_cast<std::size_t>(most);
    request.sampling = {in.value("temperature", 0.0), in.value("top_k", std::int64_t{0}), in.value("top_p", 1.0),
                        in.value("seed", std::uint64_t{0})};
    request.stream = in.value("stream", false);
    if (in.contains("configuration")) {
      request.configuration = bundle_.configuration(in.at("configuration").dump(), "configuration");
    } else {
      const std::lock_guard lock(mutex_);
      request.configuration = configuration_;
    }
    request.hash = request.configuration.hash();
    return request;
  }

  void configure(const httplib::Request& in, httplib::Response& out) {
    const auto configuration = bundle_.configuration(in.body, "configuration");
    const auto start = Clock::now();
    loras_.of(configuration, configuration.hash());  // emitted before it is the default, so that no request waits for it
    const double seconds = since(start);
    const std::lock_guard lock(mutex_);
    configuration_ = configuration;
    answer(out, 200, {{"configuration", configuration.hash()}, {"emitted_ms", seconds * 1e3}});
  }

  /// Generate on a lent session; `on_text` sees the text and the token and returns false to end.
  json run(Pool::Slot& slot, const Request& request, const std::function<bool(const std::string&, std::int64_t)>& on_text) {
    const auto start = Clock::now();
    if (slot.bound != request.hash) {
      slot.bound.clear();
      slot.session.swap(loras_.of(request.configuration, request.hash));
      slot.bound = request.hash;
      metrics_.swap(since(start));
    }
    coatrt::TextStream text(tokenizer_);
    bool first = true;
    const auto made = slot.session.generate(request.prompt, request.max_tokens, request.sampling, [&](std::int64_t token) {
      if (std::exchange(first, false)) metrics_.first_token(since(start));
      return on_text(text.add(token), token);
    });
    metrics_.tokens(made.tokens.size());
    return {{"tokens", made.tokens}, {"text", tokenizer_.decode(made.tokens)}, {"reason", made.reason}, {"configuration", request.hash}};
  }

  void generate(const httplib::Request& in, httplib::Response& out) {
    const auto start = Clock::now();
    auto request = std::make_shared<Request>(parse(in.body));
    auto lent = pool_.lend();
    if (!lent) return answer(out, 503, {{"error", "too many requests wait; try again later"}});
    if (!request->stream) {
      const auto client_is_there = [&](const std::string&, std::int64_t) { return !in.is_connection_closed(); };
      return answer(out, 200, run(**lent, *request, client_is_there));
    }

    auto lease = std::make_shared<Pool::Lease>(std::move(*lent));  // given back when the response ends
    const auto send = [](httplib::DataSink& sink, const json& event) {
      const std::string line = "data: " + dump(event) + "\n\n";
      return sink.write(line.data(), line.size());
    };
    out.set_chunked_content_provider("text/event-stream", [this, start, request, lease, send](std::size_t, httplib::DataSink& sink) {
      int status = 200;
      try {
        json last = run(**lease, *request, [&](const std::string& text, std::int64_t token) {
          return send(sink, {{"text", text}, {"token", token}});
        });
        last["done"] = true;
        send(sink, last);
      } catch (const std::exception& error) {  // the status line has gone out already
        status = 500;
        send(sink, {{"error", error.what()}});
      }
      metrics_.request(status, since(start));
      sink.done();
      return true;
    });
  }

  coatrt::Bundle bundle_;
  coatrt::Tokenizer tokenizer_;
  Pool pool_;
  Loras loras_;
  std::mutex mutex_;  // of the default configuration
  coatrt::Configuration configuration_;
  Metrics metrics_;
  httplib::Server server_;
  std::atomic<bool> stopping_{false}, ended_{false};  // asked to stop; `listen` is over
};

}  // namespace

int main(int argc, char** argv) try {
  sigset_t signals;  // blocked before any thread is made, so that only `waiter` gets them
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const Options options = parse(argc, argv);
  Service service(options);
  std::thread waiter([&] {
    int signal = 0;
    sigwait(&signals, &signal);
    service.stop();
  });
  const bool served = service.listen(options.host, options.port);
  if (!served) std::cerr << "service: " << options.host << ":" << options.port << " cannot be listened on; choose another port\n";
  pthread_kill(waiter.native_handle(), SIGTERM);
  waiter.join();
  return served ? 0 : 2;
} catch (const coatrt::Error& error) {
  std::cerr << "service: " << error.what() << "\n";
  return 2;
}
