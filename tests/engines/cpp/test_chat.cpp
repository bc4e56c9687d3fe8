// Conversations of chat.json. That the file says what the template renders is tested in Python.
#include <doctest/doctest.h>

#include "coatrt/coatrt.hpp"

namespace {

std::string file(const char* flags) {
  return std::string(R"({"start": "<s>", "start_without_system": "<s>[no system]", "prompt": "[a]", "roles": {
    "system": {"before": "[s]", "after": "\n"}, "user": {"before": "[u]", "after": "\n"},
    "assistant": {"before": "[a]", "after": "</s>"}}, )") + flags + "}";
}
const char* const kPlain = R"("strip": false, "drop_before": "", "alternate": false, "system_first": false, "ends_with_user": false)";

}  // namespace

TEST_CASE("messages stand between their role's texts") {
  const coatrt::ChatTemplate chat(file(kPlain));
  CHECK(chat.renders());
  CHECK(chat.render({{"user", " hi "}}) == "<s>[no system][u] hi \n[a]");
  CHECK(chat.render({{"system", "x"}, {"user", "y"}, {"assistant", "a</think>b"}, {"user", ""}}) == "<s>[s]x\n[u]y\n[a]a</think>b</s>[u]\n[a]");
  CHECK(chat.render({{"user", "x"}, {"system", "y"}, {"assistant", "z"}}) == "<s>[no system][u]x\n[s]y\n[a]z</s>[a]");
  CHECK_THROWS_WITH_AS(chat.render({{"tool", "x"}}), "the model's chat template takes no message of role tool", coatrt::Error);
  CHECK_THROWS_AS(chat.render({}), coatrt::Error);
}

TEST_CASE("contents are stripped and thoughts dropped, where the template does so") {
  const coatrt::ChatTemplate chat(file(R"("strip": true, "drop_before": "</think>", "alternate": true, "system_first": true, "ends_with_user": true)"));
  CHECK(chat.render({{"user", "\xc2\xa0 a\x1c b\n\x1f"}, {"assistant", "no</think>x</think>\n\n y "}, {"user", " \n"}}) == "<s>[no system][u]a\x1c b\n[a]y</s>[u]\n[a]");
  CHECK(chat.render({{"user", "a</think>b"}}) == "<s>[no system][u]a</think>b\n[a]");
  const std::vector<std::vector<coatrt::Message>> refused{
      {{"user", "a"}, {"user", "b"}}, {{"assistant", "a"}, {"user", "b"}}, {{"user", "a"}, {"assistant", "b"}}, {{"user", "a"}, {"system", "b"}, {"user", "c"}}, {{"system", "a"}}};
  for (const auto& messages : refused) CHECK_THROWS_AS(chat.render(messages), coatrt::Error);
  CHECK(chat.render({{"system", "s"}, {"user", "a"}}) == "<s>[s]s\n[u]a\n[a]");
}

TEST_CASE("a template that cannot be rendered, and files that are garbled") {
  const coatrt::ChatTemplate chat(R"({"refusal": "it writes the current date"})");
  CHECK(static_cast<bool>(chat));
  CHECK(!chat.renders());
  CHECK_THROWS_WITH_AS(chat.render({{"user", "a"}}), "it writes the current date", coatrt::Error);
  for (const char* wrong : {"", "[]", "{}", R"({"start": 1})", R"({"refusal": 1})"}) CHECK_THROWS_AS(coatrt::ChatTemplate(std::string(wrong)), coatrt::Error);
  CHECK_THROWS_WITH_AS(coatrt::ChatTemplate(file(R"("strip": 1)")), "chat.json is garbled (drop_before); build the bundle again", coatrt::Error);
}
