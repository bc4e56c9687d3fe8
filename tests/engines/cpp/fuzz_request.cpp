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

/// A text ends before the first stop string, divided or not.
void end_text(const std::vector<std::string>& stops, const std::string& text) {
  coatrt::StopStrings whole(stops), parts(stops);
  std::string shown = whole.add(text), pieces;
  for (const char byte : text) pieces += parts.add(std::string(1, byte));
  require(whole.found() == parts.found());
  if (!whole.found()) shown += whole.finish(), pieces += parts.finish();
  require(shown == pieces && text.compare(0, shown.size(), shown) == 0 && (whole.found() || shown == text));
  for (const std::string& stop : stops) require(shown.find(stop) == shown.npos);
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

void check(const ApiError& error) {  // one line, and none of the JSON library's
  require(error.status == 400 && !error.message.empty());
  require(error.message.find('\n') == error.message.npos && error.message.find("json.exception") == error.message.npos);
  require(dump(error.json()).find('\n') == std::string::npos);
}

void read_body(const std::string& body) {
  static const coatrt::ChatTemplate chat(std::string(R"({"start": "<s>", "start_without_system": "", "prompt": "[a]", "strip": true,
    "drop_before": "</think>", "alternate": false, "system_first": false, "ends_with_user": false, "roles": {
    "user": {"before": "[u]", "after": "\n"}, "assistant": {"before": "[a]", "after": "\n"}}})"));
  for (const bool to_chat : {false, true}) try {
      const ApiRequest request(body, to_chat);
      require(request.n >= 1 && request.n * std::max<std::size_t>(1, request.prompts.size()) <= ApiRequest::kMostChoices);
      require(request.max_tokens.value_or(1) >= 1 && (to_chat ? !request.messages.empty() : !request.prompts.empty()));
      for (const Prompt& prompt : request.prompts) {
        require(prompt.text.empty() != prompt.tokens.empty());
        for (const auto token : prompt.tokens) require(token >= 0);
      }
      const coatrt::Sampler sampler(request.sampling);  // what was let through is valid
      coatrt::StopStrings stops(request.stop);
      for (const Prompt& prompt : request.prompts) end_text(request.stop, prompt.text);
      if (to_chat) chat.render(request.messages);
    } catch (const ApiError& error) {
      check(error);
    } catch (const coatrt::Error& error) {  // a conversation that the template refuses
      require(to_chat && std::string_view(error.what()).find('\n') == std::string_view::npos);
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
