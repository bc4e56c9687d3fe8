#include "coatrt/session.hpp"

#include <algorithm>
#include <set>

#include "backend.hpp"
#include "coatrt/error.hpp"
#include "contract.hpp"
#include "notice.hpp"
#include "packed_lora.hpp"
#include "sampling.hpp"
#include "state.hpp"

namespace coatrt {
namespace {

/// What sets the capacity, and what to do about it, in Python's words.
const char* advice(Limit limit) {
  return limit == Limit::context
             ? "it was loaded with that context; shorten the prompt, or load it with a longer --context"
             : "the bundle was built for that context; shorten the prompt, or build with a longer --context";
}

}  // namespace

struct Session::State {
  Bundle bundle;
  std::unique_ptr<Decoder> decoder;
  detail::Contract contract;
  SessionOptions options;
  std::set<std::string> told;
  std::int64_t length = 0;
  const float* logits = nullptr;  // after the last token; none before a prefill

  Logits last() const { return {logits, static_cast<std::size_t>(decoder->vocabulary())}; }

  /// Refuse what the graph cannot run: an unknown token, or more positions than there are.
  void check(const std::int64_t* tokens, std::size_t count, std::int64_t filled) const {
    if (count == 0) throw Error("empty prompt; give at least one token per sequence");
    const std::size_t positions = static_cast<std::size_t>(filled) + count;
    if (positions > static_cast<std::size_t>(decoder->capacity()))
      throw Error(std::to_string(positions) + " positions needed, the decoder has " +
                  std::to_string(decoder->capacity()) + ": " + advice(decoder->limit()));
    const auto [least, most] = std::minmax_element(tokens, tokens + count);
    if (*most >= decoder->vocabulary() || *least < 0)
      throw Error("token id " + std::to_string(*most >= decoder->vocabulary() ? *most : *least) +
                  " is outside the vocabulary of " + std::to_string(decoder->vocabulary()) +
                  "; use the bundle's tokenizer");
  }

  /// Run tokens in pieces that the backend takes. After a failure the sequence has to start again with a prefill.
  Logits feed(const std::int64_t* tokens, std::size_t count) {
    logits = nullptr;
    const float* made = nullptr;
    const auto limit = static_cast<std::size_t>(decoder->prefill_limit());
    for (std::size_t done = 0; done < count;) {
      const std::size_t piece = std::min(limit, count - done);
      made = decoder->run(tokens + done, piece, length);
      done += piece;
      length += static_cast<std::int64_t>(piece);
    }
    logits = made;
    return last();
  }

  /// Warn about a LoRA that was emitted for another configuration than the weights'; with strict_lora refuse it.
  void check_configuration(const std::string& emitted, bool named) {
    const std::string* weights = detail::find_text(bundle.state()->manifest.at("configuration"), "hash");
    if (weights == nullptr || emitted == *weights) return;
    const std::string line = "the LoRA " +
                             (emitted.empty() ? "names no configuration" : "was emitted for configuration " + emitted) +
                             ", but the weights have " + *weights + "; emit a LoRA for " + *weights + " (coatrt adapt)";
    if (options.strict_lora) throw Error(line);
    if (named || !told.insert(line).second) return;
    detail::notify(options, line);
  }

  void bind(const Lora& lora, bool named) {
    detail::check_lora(contract, lora);
    check_configuration(lora.configuration(), named);
    decoder->set_lora(&lora);
  }
};

Session::Session(const Bundle& bundle, const SessionOptions& options)
    : Session(bundle, detail::make_decoder(bundle.state(), options), options) {}

Session::Session(const Bundle& bundle, std::unique_ptr<Decoder> decoder, const SessionOptions& options)
    : state_(new State{bundle, std::move(decoder), bundle.state()->contract(), options, {}}) {
  swap(bundle.lora());
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

Logits Session::prefill(const std::vector<std::int64_t>& tokens) {
  state_->check(tokens.data(), tokens.size(), 0);
  state_->length = 0;
  return state_->feed(tokens.data(), tokens.size());
}

Logits Session::decode(std::int64_t token) {
  if (state_->logits == nullptr) throw Error("no sequence is begun; call prefill first");
  state_->check(&token, 1, state_->length);
  return state_->feed(&token, 1);
}

std::int64_t Session::decode() {
  if (state_->logits == nullptr) throw Error("no sequence is begun; call prefill first");
  const std::int64_t token = detail::likeliest(state_->last());
  decode(token);
  return token;
}

Generated Session::generate(const std::vector<std::int64_t>& prompt, std::size_t max_tokens, const Sampling& sampling,
                            const std::function<bool(std::int64_t)>& on_token) {
  if (max_tokens < 1) throw Error("max_tokens must be at least 1, got 0");
  Sampler sampler(sampling, prompt);
  const auto& stops = state_->bundle.stop_tokens();
  Generated made;
  Logits logits = prefill(prompt);
  for (;;) {
    const std::int64_t token = sampler.next(logits);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) return made.reason = "stop", made;
    made.tokens.push_back(token);
    if (on_token && !on_token(token)) return made.reason = "cancelled", made;
    if (made.tokens.size() >= max_tokens || length() >= capacity()) return made.reason = "length", made;
    logits = decode(token);
  }
}

void Session::swap(const Configuration& configuration) { state_->bind(state_->bundle.adapt(configuration), true); }
void Session::swap(const Lora& lora) { state_->bind(lora, false); }

void Session::drop_lora() { state_->decoder->set_lora(nullptr); }

std::int64_t Session::capacity() const { return state_->decoder->capacity(); }
Limit Session::limit() const { return state_->decoder->limit(); }
std::int64_t Session::length() const { return state_->length; }

namespace detail {

std::unique_ptr<Decoder> make_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  if (options.backend == "ort") return make_ort_decoder(bundle, options);
  if (options.backend == "cuda") return make_cuda_decoder(bundle, options);
#ifdef COATRT_TRT
  if (options.backend == "trt") return make_trt_decoder(bundle, options);
#else
  if (options.backend == "trt")
    throw Error("backend 'trt' is given, which this library was compiled without; find_package(coatrt COMPONENTS trt), "
                "or use ort or cuda");
#endif
  throw Error("backend " + repr(options.backend) + " is given; allowed: ort, cuda, trt");
}

}  // namespace detail
}  // namespace coatrt
