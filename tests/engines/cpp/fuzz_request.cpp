// libFuzzer: what one connection sends, in pieces, and each whole request's body as JSON. What is served is within the limits, and the pieces do not matter.
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "http.hpp"
#include "request.hpp"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

/// What a connection is served: every request, and the status of the refusal that ends it, 0 for none.
struct Served {
  std::vector<std::string> requests;
  int refused = 0;
};

Served serve(std::string_view bytes, std::size_t piece) {
  Served served;
  RequestReader reader;
  try {
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      reader.add(bytes.substr(at, piece));
      while (const auto request = reader.next()) {
        require(request->path.substr(0, 1) == "/" && request->body.size() <= RequestReader::kMostBody);
        served.requests.push_back(request->method + " " + request->path + request->query + "\n" + request->body);
      }
      reader.asks_to_continue();
      require(reader.bytes() <= RequestReader::kMostHead + RequestReader::kMostBody + piece);
    }
  } catch (const HttpRefusal& refusal) {
    require(refusal.status >= 400 && !refusal.reason.empty());
    served.refused = refusal.status;
  }
  return served;
}

void read_body(const std::string& body) {
  try {
    const GenerateRequest request(body);
    for (const auto token : request.tokens) require(token >= 0);
    require(request.max_tokens >= 1);
  } catch (const coatrt::Error& error) {  // one line, and none of the JSON library's
    const std::string_view line = error.what();
    require(line.find('\n') == line.npos && line.find("json.exception") == line.npos);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const Served whole = serve(bytes, std::max<std::size_t>(1, size)), parts = serve(bytes, 7);
  require(whole.requests == parts.requests && whole.refused == parts.refused);
  for (const std::string& request : whole.requests) read_body(request.substr(request.find('\n') + 1));
  read_body(std::string(bytes));
  return 0;
}
