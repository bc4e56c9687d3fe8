#include "coatrt/chat.hpp"

#include <map>

#include "coatrt/error.hpp"
#include "json.hpp"
#include "state.hpp"
#include "tokenizer/unicode.hpp"

namespace coatrt {
namespace {

constexpr const char* kFile = "chat.json";

[[noreturn]] void malformed(const std::string& what) {
  throw Error("chat.json is garbled (" + what + "); build the bundle again");
}

std::string text_of(const detail::Json& value, const char* key) {
  const std::string* found = detail::find_text(value, key);
  if (found == nullptr) malformed(key);
  return *found;
}

bool flag_of(const detail::Json& value, const char* key) {
  const detail::Json* found = detail::find(value, key);
  if (found == nullptr || !found->is_boolean()) malformed(key);
  return found->get<bool>();
}

/// Without white space at both ends, as Python's str.strip.
std::string stripped(const std::string& text) {
  const auto white = [](char32_t point) { return detail::in_class(' ', point) || (point >= 0x1c && point <= 0x1f); };
  const std::vector<char32_t> points = detail::decode_utf8(text);
  std::size_t begin = 0, end = points.size();
  while (begin < end && white(points[begin])) ++begin;
  while (begin < end && white(points[end - 1])) --end;
  std::string made;
  for (std::size_t i = begin; i < end; ++i) detail::append_utf8(made, points[i]);
  return made;
}

}  // namespace

struct ChatTemplate::State {
  std::string refusal;  // why this template cannot be rendered; empty where it can
  std::string start, start_without_system, prompt, drop_before;
  std::map<std::string, std::pair<std::string, std::string>> roles;  // the texts around a message
  bool strip = false, alternate = false, system_first = false, ends_with_user = false;

  /// Refuse the orders of messages that the template refuses, or renders in another way.
  void check(const std::vector<Message>& messages) const {
    if (!refusal.empty()) throw Error(refusal);
    std::string before;
    for (std::size_t i = 0; i < messages.size(); ++i) {
      const std::string& role = messages[i].role;
      if (roles.count(role) == 0) throw Error("the model's chat template takes no message of role " + role);
      if (role == "system" && i > 0 && system_first) throw Error("the model's chat template takes a system message only as the first");
      const bool user = role == "user";
      if (alternate && role != "system" && user != (before.empty() || before == "assistant"))
        throw Error("the model's chat template takes messages of user and assistant in turn, the user's first");
      if (role != "system") before = role;
    }
    if (ends_with_user && before != "user") throw Error("the model's chat template takes the user's message as the last");
  }
};

ChatTemplate::ChatTemplate(const Bundle& bundle) {
  if (detail::find(bundle.state()->manifest.at("files"), kFile) == nullptr) return;
  *this = ChatTemplate(std::string(bundle.state()->read(kFile)->text()));
}

ChatTemplate::ChatTemplate(const std::string& json) {
  const detail::Json file = detail::parse_json(json, "chat template", kFile);
  auto state = std::make_shared<State>();
  if (const std::string* refusal = detail::find_text(file, "refusal")) {
    state->refusal = refusal->empty() ? "the model's chat template cannot be rendered" : *refusal;
    state_ = std::move(state);
    return;
  }
  state->start = text_of(file, "start");
  state->start_without_system = text_of(file, "start_without_system");
  state->prompt = text_of(file, "prompt");
  state->drop_before = text_of(file, "drop_before");
  state->strip = flag_of(file, "strip");
  state->alternate = flag_of(file, "alternate");
  state->system_first = flag_of(file, "system_first");
  state->ends_with_user = flag_of(file, "ends_with_user");
  const detail::Json* roles = detail::find(file, "roles");
  if (roles == nullptr || !roles->is_object()) malformed("roles");
  for (const auto& [role, around] : roles->items())
    state->roles[role] = {text_of(around, "before"), text_of(around, "after")};
  state_ = std::move(state);
}

bool ChatTemplate::renders() const { return state_ != nullptr && state_->refusal.empty(); }

std::string ChatTemplate::render(const std::vector<Message>& messages) const {
  if (state_ == nullptr) throw Error("the model has no chat template; send a prompt");
  if (messages.empty()) throw Error("a conversation needs at least one message");
  state_->check(messages);
  std::string made = messages[0].role == "system" ? state_->start : state_->start_without_system;
  for (const Message& message : messages) {
    std::string content = message.content;
    if (message.role == "assistant" && !state_->drop_before.empty()) {
      const std::size_t at = content.rfind(state_->drop_before);
      if (at != content.npos) {
        content.erase(0, at + state_->drop_before.size());
        content.erase(0, std::min(content.find_first_not_of('\n'), content.size()));
      }
    }
    if (state_->strip) content = stripped(content);
    const auto& [before, after] = state_->roles.at(message.role);
    made += before + content + after;
  }
  return made + state_->prompt;
}

}  // namespace coatrt
