#include <algorithm>

#include "coatrt/error.hpp"
#include "tokenizer/tokenizer.hpp"
#include "tokenizer/unicode.hpp"

namespace coatrt::detail {
namespace {

// GPT-2's pattern, the default of ByteLevel.
const char* const kByteLevel = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::int64_t kMostTokens = std::int64_t{1} << 31;

[[noreturn]] void refuse(const std::string& what) {
  throw Error("tokenizer.json has " + what + ", which the C++ tokenizer does not support; pass token ids instead");
}
[[noreturn]] void malformed(const std::string& what) {
  throw Error("tokenizer.json is garbled (" + what + "); build the bundle again");
}

std::string type_of(const Json& value) {
  const std::string* type = find_text(value, "type");
  return type == nullptr ? "nothing" : *type;
}

bool flag(const Json& value, const char* key, bool otherwise) {
  const Json* found = find(value, key);
  return found != nullptr && found->is_boolean() ? found->get<bool>() : otherwise;
}

/// The parts of a Sequence, or the value itself; none for null.
std::vector<const Json*> parts_of(const Json* value, const char* key) {
  if (value == nullptr || value->is_null()) return {};
  if (type_of(*value) != "Sequence") return {value};
  const Json* list = find(*value, key);
  if (list == nullptr || !list->is_array()) malformed(key);
  std::vector<const Json*> parts;
  for (const Json& part : *list) parts.push_back(&part);
  return parts;
}

/// GPT-2's alphabet: each byte as a printable character.
std::unordered_map<char32_t, char> alphabet() {
  std::unordered_map<char32_t, char> bytes;
  char32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    bytes[printable ? static_cast<char32_t>(byte) : next++] = static_cast<char>(byte);
  }
  return bytes;
}

/// The bytes of a token in that alphabet; the token itself where it has other characters.
std::string to_bytes(const std::string& token, const std::unordered_map<char32_t, char>& bytes) {
  std::string made;
  for (const char32_t point : decode_utf8(token)) {
    const auto found = bytes.find(point);
    if (found == bytes.end()) return token;
    made += found->second;
  }
  return made;
}

std::int64_t token_id(const Json& value) {
  std::int64_t id = 0;
  if (!whole(&value, 0, id) || id >= kMostTokens) malformed("a token id");
  return id;
}

void read_model(const Json& model, Tokenizer::State& state) {
  if (type_of(model) != "BPE") refuse("a model of type " + type_of(model));
  if (flag(model, "byte_fallback", false)) refuse("byte_fallback");
  if (const Json* dropout = find(model, "dropout"); dropout != nullptr && !dropout->is_null()) refuse("dropout");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (const std::string* text = find_text(model, key); text != nullptr && !text->empty()) refuse(key);
  const Json *vocabulary = find(model, "vocab"), *merges = find(model, "merges");
  if (vocabulary == nullptr || !vocabulary->is_object() || merges == nullptr || !merges->is_array()) malformed("model");
  const auto bytes = alphabet();
  std::unordered_map<std::string, std::int64_t> written;  // tokens as the file spells them
  for (const auto& [token, value] : vocabulary->items()) {
    const std::int64_t id = token_id(value);
    std::string raw = to_bytes(token, bytes);
    written.emplace(token, id);
    state.bytes[id] = raw;
    state.bpe.vocabulary.emplace(std::move(raw), id);
  }
  state.bpe.ignore_merges = flag(model, "ignore_merges", false);
  std::int64_t rank = 0;
  const auto id_of = [&](const std::string& token) {
    const auto found = written.find(token);
    if (found == written.end()) malformed("merges");
    return found->second;
  };
  for (const Json& merge : *merges) {
    std::string left, right;
    if (merge.is_string()) {  // "a b" in older files
      const auto text = merge.get<std::string>();
      const std::size_t space = text.find(' ');
      if (space == text.npos) malformed("merges");
      left = text.substr(0, space), right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
    } else {
      malformed("merges");
    }
    state.bpe.add_merge(id_of(left), id_of(right), id_of(left + right), rank++);
  }
  state.bpe.finish();
}

void read_added(const Json* tokens, Tokenizer::State& state) {
  if (tokens == nullptr) return;
  if (!tokens->is_array()) malformed("added_tokens");
  for (const Json& token : *tokens) {
    const std::string* content = find_text(token, "content");
    if (content == nullptr || content->empty() || find(token, "id") == nullptr) malformed("added_tokens");
    if (flag(token, "single_word", false)) refuse("an added token with single_word");
    const std::int64_t id = token_id(*find(token, "id"));
    const auto points = decode_utf8(*content);
    const bool normalized = flag(token, "normalized", false);
    state.added[normalized ? 1 : 0][points.front()].push_back(
        {id, {points.begin(), points.end()}, flag(token, "lstrip", false), flag(token, "rstrip", false)});
    state.bytes[id] = *content;
    if (flag(token, "special", false)) state.special.insert(id);
  }
  for (auto& group : state.added)  // of several that begin at one place the longest wins
    for (auto& [first, alike] : group)
      std::stable_sort(alike.begin(), alike.end(),
                       [](const auto& a, const auto& b) { return a.content.size() > b.content.size(); });
}

void read_split(const Json& split, Tokenizer::State& state) {
  const Json* pattern = find(split, "pattern");
  const std::string* behavior = find_text(split, "behavior");
  if (pattern == nullptr || behavior == nullptr) malformed("pre_tokenizer");
  if (*behavior != "Isolated" || flag(split, "invert", false)) refuse("a split that is " + *behavior + " or inverted");
  if (const std::string* regex = find_text(*pattern, "Regex")) state.splits.emplace_back(*regex);
  else if (const std::string* text = find_text(*pattern, "String")) state.splits.push_back(Pattern::literal(*text));
  else malformed("pre_tokenizer");
}

void read_pre_tokenizer(const Json* value, Tokenizer::State& state) {
  bool byte_level = false;
  for (const Json* part : parts_of(value, "pretokenizers")) {
    const std::string type = type_of(*part);
    if (byte_level) refuse("a pre-tokenizer after ByteLevel");
    if (type == "ByteLevel") {
      byte_level = true;
      state.prefix_space = flag(*part, "add_prefix_space", true);
      if (state.prefix_space && !state.splits.empty()) refuse("add_prefix_space after a split");
      if (flag(*part, "use_regex", true)) state.splits.emplace_back(kByteLevel);
    } else if (type == "Digits") {
      state.splits.emplace_back(flag(*part, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)");
    } else if (type == "Split") {
      read_split(*part, state);
    } else {
      refuse("a pre-tokenizer of type " + type);
    }
  }
  if (!byte_level) refuse("no ByteLevel pre-tokenizer");
}

void read_post_processor(const Json* value, Tokenizer::State& state) {
  for (const Json* part : parts_of(value, "processors")) {
    const std::string type = type_of(*part);
    if (type == "ByteLevel") continue;
    if (type != "TemplateProcessing") refuse("a post-processor of type " + type);
    const Json *single = find(*part, "single"), *specials = find(*part, "special_tokens");
    if (single == nullptr || !single->is_array() || specials == nullptr) malformed("post_processor");
    bool seen = false;
    for (const Json& piece : *single) {
      if (find(piece, "Sequence") != nullptr) {
        seen = true;
        continue;
      }
      const Json* token = find(piece, "SpecialToken");
      const std::string* name = token == nullptr ? nullptr : find_text(*token, "id");
      const Json* facts = name == nullptr ? nullptr : find(*specials, name->c_str());
      const Json* ids = facts == nullptr ? nullptr : find(*facts, "ids");
      if (ids == nullptr || !ids->is_array()) malformed("post_processor");
      for (const Json& id : *ids) (seen ? state.after : state.before).push_back(token_id(id));
    }
  }
}

}  // namespace

Tokenizer::State read_tokenizer(std::string_view json) {
  const Json file = parse_json(json, "tokenizer", "tokenizer.json");
  const Json* model = find(file, "model");
  if (model == nullptr) malformed("model");
  Tokenizer::State state;
  for (const Json* part : parts_of(find(file, "normalizer"), "normalizers")) {
    if (type_of(*part) != "NFC") refuse("a normalizer of type " + type_of(*part));
    state.nfc = true;
  }
  read_model(*model, state);
  read_added(find(file, "added_tokens"), state);
  read_pre_tokenizer(find(file, "pre_tokenizer"), state);
  read_post_processor(find(file, "post_processor"), state);
  return state;
}

}  // namespace coatrt::detail
