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

/// The answer to one request, written by one thread and sent by the server's. Writing never waits for the client: unread
/// bytes are kept, and a client that leaves too many is disconnected. A reply dropped without an answer ends the connection.
class Reply {
 public:
  Reply(std::shared_ptr<const Waker> waker, const HttpRequest& request)
      : waker_(std::move(waker)), keep_alive_(request.keep_alive), chunked_(request.chunked) {}

  /// A whole answer; `headers` are more lines of its head, each with its line break.
  void answer(int status, std::string_view type, std::string_view body, std::string_view headers = "");
  /// The head of an answer in parts.
  void begin(std::string_view type);
  void part(std::string_view bytes);
  void end();
  /// Whether the client is gone, so that the answer is not needed.
  bool gone() const { return gone_; }

 private:
  friend class Server;
  static constexpr std::size_t kMostUnread = 4 << 20;
  void add(std::string_view bytes, bool finished);

  std::shared_ptr<const Waker> waker_;
  const bool keep_alive_, chunked_;
  std::mutex mutex_;
  std::string bytes_;  // not yet taken by the server's thread
  bool finished_ = false;
  std::atomic<std::size_t> unsent_{0};  // bytes taken by the server's thread and not by the client
  std::atomic<bool> gone_{false};
};

/// HTTP on one thread that waits for no client. The handler gets complete requests. Slow clients take a connection and no
/// thread; where all connections are taken, a new one replaces that nearest to its deadline.
class Server {
 public:
  /// Called on the server's thread, so it must not block; another thread may write the answer.
  using Handler = std::function<void(HttpRequest&& request, const std::shared_ptr<Reply>& reply)>;
  static constexpr std::chrono::milliseconds kGrace{2500};  // time to finish answers after `stop`
  static constexpr std::size_t kMostHeld = 64 << 20;    // bytes of incomplete requests

  /// `deadline` limits how long a request takes to arrive, and how long the client takes to read a complete answer.
  Server(Handler handler, std::size_t most_connections, std::chrono::seconds deadline);
  ~Server();
  /// Listen; false where the address is not available. Port 0 takes a free port: `port()` returns it.
  bool bind(const std::string& host, int port);
  int port() const;
  /// Serve until `stop`, then finish running answers for at most `kGrace`.
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
  Clock::time_point accept_from_{};  // when to accept again after no descriptor was free
  std::atomic<bool> stopped_{false};
};
