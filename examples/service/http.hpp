#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

/// One complete request.
struct HttpRequest {
  std::string method, path, query, body;
  std::string authorization, content_type;  // of the head
  bool keep_alive = true;  // whether the connection may serve another
  bool chunked = true;     // whether the client reads chunks: HTTP/1.1
};

/// An error answer that ends the connection.
struct HttpRefusal {
  int status;
  std::string reason;
};

/// Parses the requests of one connection. It buffers at most one head, one body and the bytes of one read.
class RequestReader {
 public:
  static constexpr std::size_t kMostHead = 16 << 10, kMostBody = 1 << 20;

  void add(std::string_view bytes) { held_ += bytes; }
  bool begun() const { return head_ || !held_.empty(); }
  std::size_t bytes() const { return held_.size(); }

  /// The next request, or nothing where more bytes are needed. Throws HttpRefusal.
  std::optional<HttpRequest> next() {
    if (!head_ && !read_head()) return std::nullopt;
    if (held_.size() < length_) return std::nullopt;
    HttpRequest request = std::move(*head_);
    request.body = held_.substr(0, length_);
    held_.erase(0, length_);
    head_.reset();
    searched_ = length_ = given_ = 0;
    expects_ = false;
    return request;
  }

  /// Whether the client waits for "100 Continue" before it sends the body; true once for each request.
  bool asks_to_continue() { return std::exchange(expects_, false) && held_.size() < length_; }

 private:
  bool read_head() {
    const std::size_t end = held_.find("\r\n\r\n", searched_ < 3 ? 0 : searched_ - 3);
    searched_ = held_.size();
    if (std::min(end, held_.size()) > kMostHead)
      throw HttpRefusal{431, "the request's head has more than 16384 bytes; send fewer headers"};
    if (end == held_.npos) return false;
    std::string_view lines = std::string_view(held_).substr(0, end + 2);
    HttpRequest request;
    request_line(take_line(lines), request);
    while (!lines.empty()) header(take_line(lines), request);
    held_.erase(0, end + 4);
    head_ = std::move(request);
    return true;
  }

  static std::string_view take_line(std::string_view& lines) {
    const std::size_t end = lines.find("\r\n");
    const std::string_view line = lines.substr(0, end);
    lines.remove_prefix(end + 2);
    const auto control = [](unsigned char c) { return (c < 0x20 && c != '\t') || c == 0x7f; };
    if (std::any_of(line.begin(), line.end(), control)) throw HttpRefusal{400, "the request's head has control characters"};
    return line;
  }

  static void request_line(std::string_view line, HttpRequest& request) {
    const std::size_t one = line.find(' '), two = line.find(' ', one == line.npos ? one : one + 1);
    if (one == 0 || two == line.npos || line.substr(one + 1, 1) != "/" || line.find(' ', two + 1) != line.npos)
      throw HttpRefusal{400, "the first line is no request; send METHOD /path HTTP/1.1"};
    const std::string_view target = line.substr(one + 1, two - one - 1), version = line.substr(two + 1);
    if (version != "HTTP/1.1" && version != "HTTP/1.0") throw HttpRefusal{505, "HTTP/1.1 and HTTP/1.0 are served here"};
    request.method = line.substr(0, one);
    const std::size_t mark = std::min(target.find('?'), target.size());
    request.path = target.substr(0, mark);
    request.query = target.substr(mark);
    request.keep_alive = request.chunked = version == "HTTP/1.1";
  }

  void header(std::string_view line, HttpRequest& request) {
    const std::size_t colon = line.find(':');
    if (colon == 0 || colon == line.npos || line.substr(0, colon).find_first_of(" \t") != line.npos)
      throw HttpRefusal{400, "a line of the head is no header; send Name: value"};
    const std::string name = lower(line.substr(0, colon)), value = lower(trimmed(line.substr(colon + 1)));
    if (name == "content-length") {
      const auto digit = [](char c) { return c >= '0' && c <= '9'; };
      if (value.empty() || !std::all_of(value.begin(), value.end(), digit) || given_++ > 0)
        throw HttpRefusal{400, "Content-Length must be one whole number, given once"};
      length_ = parsed(value);
      if (length_ > kMostBody) throw HttpRefusal{413, "the body has more than 1048576 bytes; send a shorter one"};
    } else if (name == "transfer-encoding") {
      throw HttpRefusal{411, "a body needs a Content-Length; chunks are not taken"};
    } else if (name == "authorization") {
      request.authorization = trimmed(line.substr(colon + 1));
    } else if (name == "content-type") {
      request.content_type = trimmed(std::string_view(value).substr(0, value.find(';')));
    } else if (name == "connection") {
      if (value.find("close") != value.npos) request.keep_alive = false;
    } else if (name == "expect") {
      expects_ = value == "100-continue";
    }
  }

  static std::size_t parsed(const std::string& digits) {  // numbers above the limit need no exact value
    const std::size_t first = std::min(digits.find_first_not_of('0'), digits.size() - 1);
    return digits.size() - first > 9 ? kMostBody + 1 : std::stoul(digits);
  }
  static std::string_view trimmed(std::string_view text) {
    const std::size_t first = text.find_first_not_of(" \t");
    return first == text.npos ? "" : text.substr(first, text.find_last_not_of(" \t") + 1 - first);
  }
  static std::string lower(std::string_view text) {
    std::string made(text);
    for (char& c : made)
      if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
    return made;
  }

  std::string held_;
  std::optional<HttpRequest> head_;
  std::size_t searched_ = 0, length_ = 0, given_ = 0;
  bool expects_ = false;
};

/// Status line and headers of an answer; `headers` are more of them, each with its line break. Without `length` the body is chunked or ends with the connection.
inline std::string response_head(int status, std::string_view type, std::optional<std::size_t> length, bool chunked,
                                 bool keep_alive, std::string_view headers = "") {
  const char* text = status == 200   ? "OK"
                     : status == 400 ? "Bad Request"
                     : status == 401 ? "Unauthorized"
                     : status == 404 ? "Not Found"
                     : status == 405 ? "Method Not Allowed"
                     : status == 408 ? "Request Timeout"
                     : status == 411 ? "Length Required"
                     : status == 413 ? "Content Too Large"
                     : status == 415 ? "Unsupported Media Type"
                     : status == 431 ? "Request Header Fields Too Large"
                     : status == 500 ? "Internal Server Error"
                     : status == 503 ? "Service Unavailable"
                     : status == 504 ? "Gateway Timeout"
                                     : "HTTP Version Not Supported";
  std::string head = "HTTP/1.1 " + std::to_string(status) + " " + text + "\r\nContent-Type: " + std::string(type) + "\r\n";
  head += headers;
  if (length) head += "Content-Length: " + std::to_string(*length) + "\r\n";
  else if (chunked) head += "Transfer-Encoding: chunked\r\n";
  return head + (keep_alive ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n");
}
