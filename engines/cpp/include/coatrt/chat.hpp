#pragma once
#include <memory>
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"

namespace coatrt {

struct Message {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// Renders conversations as the model's chat template does. `coatrt build` measures the template: the texts around a
/// message of each role (`chat.json`). Templates that need more than that are refused with the reason.
class ChatTemplate {
 public:
  /// The bundle's; its hash is checked.
  explicit ChatTemplate(const Bundle& bundle);
  /// From the text of a chat.json.
  explicit ChatTemplate(const std::string& json);
  /// Whether the model has a template at all.
  explicit operator bool() const { return state_ != nullptr; }
  /// Whether that template can be rendered here.
  bool renders() const;
  /// The prompt: all messages, and the opening of the assistant's next one. Throws Error for what the template refuses.
  std::string render(const std::vector<Message>& messages) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace coatrt
