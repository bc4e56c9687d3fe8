#include "server.hpp"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <numeric>
#include <system_error>
#include <vector>

namespace {

constexpr std::chrono::milliseconds kTick{100};  // how late a deadline may be noticed
constexpr std::chrono::seconds kLinger{1};       // time for a client to read the last answer before its connection ends
constexpr int kAcceptedAtOnce = 64;

}  // namespace

Waker::Waker() : descriptor_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), "no eventfd");
}
Waker::~Waker() { ::close(descriptor_); }
void Waker::wake() const {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(descriptor_, &one, sizeof one);
}
void Waker::clear() const {
  std::uint64_t count = 0;
  [[maybe_unused]] const auto taken = ::read(descriptor_, &count, sizeof count);
}

void Reply::add(std::string_view bytes, bool finished) {
  if (gone_) return;
  {
    const std::lock_guard lock(mutex_);
    bytes_ += bytes;
    finished_ = finished_ || finished;
    if (bytes_.size() + unsent_ > kMostUnread && !finished) gone_ = true;
  }
  waker_->wake();
}

void Reply::answer(int status, std::string_view type, std::string_view body, std::string_view headers) {
  add(response_head(status, type, body.size(), false, keep_alive_, headers).append(body), true);
}

void Reply::begin(std::string_view type) {
  add(response_head(200, type, std::nullopt, chunked_, chunked_ && keep_alive_), false);
}

void Reply::part(std::string_view bytes) {
  if (!chunked_) return add(bytes, false);
  char size[20];
  std::snprintf(size, sizeof size, "%zx\r\n", bytes.size());
  add(std::string(size).append(bytes).append("\r\n"), false);
}

void Reply::end() { add(chunked_ ? "0\r\n\r\n" : "", true); }

struct Server::Connection {
  enum State { kReading, kAnswering, kClosing } state = kReading;
  int descriptor;
  Clock::time_point deadline;  // the far future while an answer is computed
  RequestReader reader{};
  std::shared_ptr<Reply> reply{};
  std::string out{};
  std::size_t sent = 0;
  bool keep_alive = true, shut = false, over = false;
  bool more = false;  // bytes of the next request came with the last one, so poll does not report them

  Connection(int fd, Clock::time_point until) : descriptor(fd), deadline(until) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() {
    if (reply) reply->gone_ = true;
    ::close(descriptor);
  }
  bool unsent() const { return sent < out.size(); }
};

Server::Server(Handler handler, std::size_t most_connections, std::chrono::seconds deadline)
    : handler_(std::move(handler)), most_(most_connections), deadline_(deadline), waker_(std::make_shared<const Waker>()) {
  rlimit files{};  // each connection takes a descriptor; the bundle and the libraries take others
  const rlim_t needed = most_ + 256;
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < needed) {
    files.rlim_cur = std::min(files.rlim_max, needed);
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
}

Server::~Server() {
  if (listener_ >= 0) ::close(listener_);
}

bool Server::bind(const std::string& host, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return false;
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> held(found, ::freeaddrinfo);
  for (const addrinfo* at = found; at != nullptr && listener_ < 0; at = at->ai_next) {
    const int made = ::socket(at->ai_family, at->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, at->ai_protocol);
    const int yes = 1;
    if (made < 0) continue;
    ::setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (::bind(made, at->ai_addr, at->ai_addrlen) == 0 && ::listen(made, 1024) == 0) listener_ = made;
    else ::close(made);
  }
  return listener_ >= 0;
}

int Server::port() const {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                             : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

void Server::stop() {
  stopped_ = true;
  waker_->wake();
}

/// End the connection nearest to its deadline; false where every connection waits for an answer.
bool Server::evict() {
  const auto nearest = std::min_element(connections_.begin(), connections_.end(),
                                        [](const auto& a, const auto& b) { return a.deadline < b.deadline; });
  if (nearest == connections_.end() || nearest->deadline == Clock::time_point::max()) return false;
  connections_.erase(nearest);
  return true;
}

void Server::accept_all(Clock::time_point now) {
  for (int count = 0; count < kAcceptedAtOnce; ++count) {
    const int made = ::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (made < 0) {
      const bool full = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
      if (full && !evict()) accept_from_ = now + kTick;
      return;
    }
    if (connections_.size() >= most_ && !evict()) {
      ::close(made);
      continue;
    }
    const int yes = 1;  // a token must not wait for the next one
    ::setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    connections_.emplace_back(made, now + deadline_);
  }
}

void Server::read(Connection& connection, Clock::time_point now) {
  static thread_local std::vector<char> buffer(64 << 10);
  const ssize_t count = ::recv(connection.descriptor, buffer.data(), buffer.size(), 0);
  if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) connection.over = true;
  if (count <= 0 || connection.state == Connection::kClosing) return;  // bytes after the last answer are dropped
  connection.reader.add({buffer.data(), static_cast<std::size_t>(count)});
  next_request(connection, now);
}

void Server::next_request(Connection& connection, Clock::time_point now) try {
  auto request = connection.reader.next();
  if (!request) {
    if (connection.reader.asks_to_continue()) {
      connection.out = "HTTP/1.1 100 Continue\r\n\r\n";
      connection.sent = 0;
      write(connection, now);
    }
    return;
  }
  connection.state = Connection::kAnswering;
  connection.deadline = Clock::time_point::max();
  connection.reply = std::make_shared<Reply>(waker_, *request);
  connection.keep_alive = request->keep_alive;
  handler_(std::move(*request), connection.reply);
  collect(connection, now);
} catch (const HttpRefusal& refusal) {
  refuse(connection, refusal, now);
}

void Server::refuse(Connection& connection, const HttpRefusal& refusal, Clock::time_point now) {
  const std::string body = R"({"error":{"message":")" + refusal.reason +
                           R"(","type":"invalid_request_error","param":null,"code":null}})" + "\n";
  connection.out = response_head(refusal.status, "application/json", body.size(), false, false) + body;
  connection.sent = 0;
  connection.reader = {};
  connection.state = Connection::kClosing;
  connection.deadline = now + kLinger;
  write(connection, now);
}

/// Move the bytes of the reply so far to the connection.
void Server::collect(Connection& connection, Clock::time_point now) {
  const bool alone = connection.reply.use_count() == 1;  // no thread writes to it any more
  bool finished = false;
  {
    const std::lock_guard lock(connection.reply->mutex_);
    connection.out.erase(0, connection.sent);
    connection.sent = 0;
    connection.out += connection.reply->bytes_;
    connection.reply->bytes_.clear();
    finished = connection.reply->finished_;
  }
  if (finished && connection.deadline == Clock::time_point::max()) connection.deadline = now + deadline_;
  if (!finished && alone) connection.over = true;
  write(connection, now);
}

void Server::write(Connection& connection, Clock::time_point now) {
  while (connection.unsent()) {
    if (connection.reply) connection.reply->unsent_ = connection.out.size() - connection.sent;
    const ssize_t count = ::send(connection.descriptor, connection.out.data() + connection.sent,
                                 connection.out.size() - connection.sent, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno != EAGAIN && errno != EINTR) connection.over = true;
      return;
    }
    connection.sent += static_cast<std::size_t>(count);
  }
  connection.out.clear();
  connection.sent = 0;
  if (connection.reply) connection.reply->unsent_ = 0;
  finish(connection, now);
}

/// After an answer: wait for the next request, or end the connection.
void Server::finish(Connection& connection, Clock::time_point now) {
  if (connection.state == Connection::kAnswering && connection.deadline != Clock::time_point::max()) {
    connection.reply.reset();
    connection.state = connection.keep_alive ? Connection::kReading : Connection::kClosing;
    connection.deadline = now + (connection.keep_alive ? deadline_ : kLinger);
    connection.more = connection.keep_alive && connection.reader.begun();
  }
  if (connection.state == Connection::kClosing && !std::exchange(connection.shut, true))
    ::shutdown(connection.descriptor, SHUT_WR);  // closing with unread bytes would discard the answer
}

/// One round: wait for something to happen, then give every connection one turn.
void Server::wait_and_handle(bool stopping) {
  bool at_once = false;
  std::vector<pollfd> polled{{waker_->descriptor(), POLLIN, 0}, {-1, POLLIN, 0}};
  if (!stopping && Clock::now() >= accept_from_) polled[1].fd = listener_;
  for (const Connection& connection : connections_) {
    short events = connection.unsent() ? POLLOUT : 0;
    // A client that closes before its answer is complete is gone; one that closes later may still read it.
    if (connection.state != Connection::kAnswering) events |= POLLIN;
    else if (connection.deadline == Clock::time_point::max()) events |= POLLRDHUP;
    polled.push_back({connection.descriptor, events, 0});
    at_once = at_once || connection.more;
  }
  const auto tick = static_cast<int>(kTick.count());
  if (::poll(polled.data(), polled.size(), at_once ? 0 : tick) < 0) return;
  waker_->clear();
  const auto now = Clock::now();
  std::size_t index = 2;
  for (Connection& connection : connections_) {
    const short events = polled[index++].revents;
    if ((events & (POLLERR | POLLNVAL | POLLRDHUP)) != 0) connection.over = true;
    if ((events & POLLHUP) != 0 && connection.state == Connection::kAnswering) connection.over = true;
    if (connection.reply && connection.reply->gone_) connection.over = true;
    if (connection.over) continue;
    if (connection.state == Connection::kAnswering) collect(connection, now);
    else if (std::exchange(connection.more, false)) next_request(connection, now);
    else if ((events & POLLOUT) != 0) write(connection, now);
    else if ((events & (POLLIN | POLLHUP)) != 0) read(connection, now);
    if (now < connection.deadline || connection.over) continue;
    if (connection.state == Connection::kReading && connection.reader.begun())
      refuse(connection, {408, "the request was not whole within " + std::to_string(deadline_.count()) + " s"}, now);
    else connection.over = true;
  }
  connections_.remove_if([](const Connection& connection) { return connection.over; });
  const auto held = [&] {
    return std::accumulate(connections_.begin(), connections_.end(), std::size_t{0},
                           [](std::size_t sum, const Connection& connection) { return sum + connection.reader.bytes(); });
  };
  while (held() > kMostHeld && evict()) continue;
  if ((polled[1].revents & POLLIN) != 0) accept_all(now);
}

void Server::serve() {
  Clock::time_point last{};
  while (true) {
    const bool stopping = stopped_;
    if (stopping) {
      if (last == Clock::time_point{}) last = Clock::now() + kGrace;
      if (listener_ >= 0) ::close(std::exchange(listener_, -1));
      connections_.remove_if([](const Connection& connection) { return connection.state == Connection::kReading; });
      if (connections_.empty() || Clock::now() >= last) break;
    }
    wait_and_handle(stopping);
  }
  connections_.clear();
}
