#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "http.hpp"

/// Wakes the server's thread from another one.
class Waker {
 public:
  Waker();
  ~Waker();
  Waker(const Waker&) = delete;
  Waker& operator=(const Waker&) = delete;
  void wake() const;
  void clear() const;
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

/// The answer to one request, written by one thread, sent by the server's; without one the connection ends. Writing never
/// waits for the client: what it has not read is kept, and a client that leaves too much unread is gone.
class Reply {
 public:
  Reply(std::shared_ptr<const Waker> waker, const HttpRequest& request)
      : waker_(std::move(waker)), keep_alive_(request.keep_alive), chunked_(request.chunked) {}

  /// A whole answer.
  void answer(int status, std::string_view type, std::string_view body);
  /// The head of an answer in parts.
  void begin(std::string_view type);
  void part(std::string_view bytes);
  void end();
  /// Whether nobody reads the answer any more; then it need not be made.
  bool gone() const { return gone_; }

 private:
  friend class Server;
  static constexpr std::size_t kMostUnread = 4 << 20;
  void add(std::string_view bytes, bool finished);

  std::shared_ptr<const Waker> waker_;
  const bool keep_alive_, chunked_;
  std::mutex mutex_;
  std::string bytes_;  // not yet taken by the server
  bool finished_ = false;
  std::atomic<std::size_t> unsent_{0};  // bytes it has taken that the client has not
  std::atomic<bool> gone_{false};
};

/// HTTP on one thread that waits for no client. A request reaches the handler when it is whole; connections that take
/// longer than that, or that do not read their answer, cost no thread, only a place among the connections, and the one
/// nearest to its deadline gives its place to the next that comes.
class Server {
 public:
  /// Called on the server's thread, so it must not wait; the answer may be made by another thread.
  using Handler = std::function<void(HttpRequest&& request, const std::shared_ptr<Reply>& reply)>;
  static constexpr std::chrono::seconds kGrace{2};      // for answers begun, once it is told to stop
  static constexpr std::size_t kMostHeld = 64 << 20;    // bytes of requests that are not whole yet

  /// `deadline` is for a whole request to arrive, and for the client to read what is left of an answer that is whole.
  Server(Handler handler, std::size_t most_connections, std::chrono::seconds deadline);
  ~Server();
  /// Listen; false where the address cannot be had. Port 0 is any free one; `port()` says which.
  bool bind(const std::string& host, int port);
  int port() const;
  /// Serve until `stop`, then for as long as answers are being made, at most `kGrace`.
  void serve();
  /// From any thread, also before `serve`.
  void stop();

 private:
  using Clock = std::chrono::steady_clock;
  struct Connection;

  void accept_all(Clock::time_point now);
  void read(Connection& connection, Clock::time_point now);
  void next_request(Connection& connection, Clock::time_point now);
  void refuse(Connection& connection, const HttpRefusal& refusal, Clock::time_point now);
  void collect(Connection& connection, Clock::time_point now);
  void write(Connection& connection, Clock::time_point now);
  void finish(Connection& connection, Clock::time_point now);
  bool evict();
  void wait_and_handle(bool stopping);

  Handler handler_;
  const std::size_t most_;
  const std::chrono::seconds deadline_;
  std::shared_ptr<const Waker> waker_;
  std::list<Connection> connections_;
  int listener_ = -1;
  Clock::time_point accept_from_{};  // no descriptor was free: not before then
  std::atomic<bool> stopped_{false};
};
