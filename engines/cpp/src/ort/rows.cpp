// Rows of a batch in ONNX Runtime on the CPU: the caches of all rows are one tensor for each layer. A step binds the part
// of it that holds the rows to be run, so rows of one LoRA are brought together first; a prompt binds its own row.

#include "rows.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "activations.hpp"
#include "coatrt/error.hpp"
#include "ort/loaded.hpp"
#include "packed_lora.hpp"
#include "state.hpp"

namespace coatrt::detail {
namespace {

/// Memory that is zero, and not resident before it is written to.
class ZeroMemory {
 public:
  explicit ZeroMemory(std::size_t bytes) : data_(static_cast<unsigned char*>(std::calloc(1, std::max<std::size_t>(bytes, 1)))) {
    if (data_ == nullptr)
      throw Error("not enough memory for caches of " + std::to_string(bytes >> 20) +
                  " MiB a tensor; use fewer sequences, or a shorter context");
  }
  ZeroMemory(ZeroMemory&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  ZeroMemory(const ZeroMemory&) = delete;
  ZeroMemory& operator=(const ZeroMemory&) = delete;
  ~ZeroMemory() { std::free(data_); }
  unsigned char* data() const { return data_; }

 private:
  unsigned char* data_;
};

/// A LoRA bound to the graph, shared by the rows that have it.
struct Bound {
  const OrtRuntime& runtime;
  Lora lora;  // keeps its tensors
  std::vector<unsigned char> bytes;
  OrtIoBinding* binding = nullptr;

  Bound(const Loaded& loaded, const LoraLayout& layout, const Lora* chosen)
      : runtime(loaded.model.runtime()), bytes(layout.bytes()) {
    if (chosen != nullptr) lora = *chosen, layout.fill(lora, bytes.data());
    runtime.check(runtime.api().CreateIoBinding(loaded.model.session(), &binding), "ONNX Runtime fails");
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
  /// What tells LoRAs apart; none for zeros.
  const float* identity() const { return address(lora); }
  static const float* address(const Lora& lora) { return lora.tensors().empty() ? nullptr : lora.tensors()[0].data; }
  ~Bound() {
    if (binding != nullptr) runtime.api().ReleaseIoBinding(binding);
  }
};

class OrtRows final : public Rows {
 public:
  OrtRows(std::shared_ptr<Loaded> loaded, std::size_t rows, std::int64_t context)
      : loaded_(std::move(loaded)),
        io_(loaded_->io),
        runtime_(loaded_->model.runtime()),
        layout_(loaded_->contract, io_.activations, static_cast<std::size_t>(io_.itemsize())),
        places_(rows + rows % 2),
        limit_(loaded_->limit(context)) {
    capacity_ = loaded_->capacity(context);
    slots_ = io_.cache_length > 0 ? io_.cache_length : capacity_;
    const std::size_t bytes = place_bytes();
    for (std::size_t i = 0; i < io_.caches().size(); ++i) caches_.emplace_back(bytes * places_.size());
    for (std::size_t i = 0; i < places_.size(); ++i) place_of_.push_back(i);
    const std::size_t width = static_cast<std::size_t>(io_.vocabulary) * places_.size();
    logits_.resize(width);
    if (io_.itemsize() != 4) raw_logits_.resize(width);
  }

  std::int64_t capacity() const override { return capacity_; }
  Limit limit() const override { return limit_; }
  std::int64_t prefill_limit() const override { return capacity_; }
  std::int64_t vocabulary() const override { return io_.vocabulary; }

  void set_lora(std::size_t row, const Lora* lora) override {
    const float* const identity = lora == nullptr ? nullptr : Bound::address(*lora);
    const auto same = [&](const Place& place) { return place.bound && place.bound->identity() == identity; };
    const auto found = std::find_if(places_.begin(), places_.end(), same);
    places_[place_of_[row]].bound = found == places_.end() ? bound(lora) : found->bound;
  }

  bool copy(std::size_t from, std::size_t to, std::int64_t length) override {
    const std::size_t source = place_of_[from], target = place_of_[to];
    if (source == target) return true;
    const std::size_t bytes = static_cast<std::size_t>(length) * position_bytes();
    for (const ZeroMemory& cache : caches_)
      for (std::int64_t head = 0; head < io_.kv_heads; ++head)
        std::memcpy(at(cache, target, head), at(cache, source, head), bytes);
    places_[target].bound = places_[source].bound;
    places_[target].filled = length;
    return true;
  }

  const float* run(std::size_t row, const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    const std::size_t place = place_of_[row];
    const bool pad = count % 2 == 1 && start + static_cast<std::int64_t>(count) < capacity_;
    ids_.assign(tokens, tokens + count);
    if (pad) ids_.push_back(0);  // its key and value are overwritten by the next token
    positions_.clear();
    for (std::size_t i = 0; i < ids_.size(); ++i) positions_.push_back(clamped(start + static_cast<std::int64_t>(i)));
    starts_.assign(1, start);
    indices_.assign(1, static_cast<std::int64_t>(count) - 1);
    execute(*places_[place].bound, place, 1);
    places_[place].filled = start + static_cast<std::int64_t>(count);
    return logits_.data();
  }

  std::vector<const float*> step(const std::vector<RowToken>& tokens) override {
    std::vector<const float*> made(tokens.size());
    std::vector<std::size_t> order = arrange(tokens);
    std::size_t filled = 0;  // places whose logits are there
    for (std::size_t begin = 0; begin < order.size();) {
      const Bound* group = bound_of(tokens[order[begin]]);
      std::size_t end = begin;
      while (end < order.size() && bound_of(tokens[order[end]]) == group) ++end;
      // An even number of places: the one behind, or before, also runs, and what it writes is overwritten.
      const std::size_t odd = (end - begin) % 2, first = end + odd > places_.size() ? begin - odd : begin;
      const std::size_t count = end - begin + odd;
      ids_.assign(count, 0);
      starts_.clear();
      positions_.clear();
      indices_.assign(count, 0);
      for (std::size_t place = first; place < first + count; ++place) {
        starts_.push_back(std::min(places_[place].filled, capacity_ - 1));  // of a full row nobody reads the last one
        positions_.push_back(clamped(starts_.back()));
      }
      for (std::size_t i = begin; i < end; ++i) {
        const RowToken& token = tokens[order[i]];
        ids_[i - first] = token.token;
        starts_[i - first] = token.position;
        positions_[i - first] = clamped(token.position);
      }
      execute(*places_[begin].bound, first, count);
      const auto width = static_cast<std::size_t>(io_.vocabulary);
      if (step_logits_.size() < (filled + count) * width) step_logits_.resize(places_.size() * 2 * width);
      for (std::size_t i = begin; i < end; ++i) {
        float* to = step_logits_.data() + (filled + i - begin) * width;
        std::memcpy(to, logits_.data() + (i - first) * width, width * sizeof(float));
        made[order[i]] = to;
        places_[i].filled = tokens[order[i]].position + 1;
      }
      filled += end - begin;
      begin = end;
    }
    return made;
  }

 private:
  /// What lies at a place of the caches.
  struct Place {
    std::shared_ptr<Bound> bound;
    std::int64_t filled = 0;  // positions written
  };

  void check(OrtStatus* status) const { runtime_.check(status, "ONNX Runtime fails"); }
  std::int64_t clamped(std::int64_t position) const { return std::min(position, io_.max_positions - 1); }
  std::size_t position_bytes() const { return static_cast<std::size_t>(io_.head_dim * io_.itemsize()); }
  std::size_t place_bytes() const { return static_cast<std::size_t>(io_.kv_heads * slots_) * position_bytes(); }
  unsigned char* at(const ZeroMemory& cache, std::size_t place, std::int64_t head) const {
    return cache.data() + place * place_bytes() + static_cast<std::size_t>(head * slots_) * position_bytes();
  }
  const Bound* bound_of(const RowToken& token) const { return places_[place_of_[token.row]].bound.get(); }

  /// Bring the rows of a step to the first places, those of one LoRA together, and return their order. Rows that stay
  /// together stay where they are, so this copies only after a row joined or left.
  std::vector<std::size_t> arrange(const std::vector<RowToken>& tokens) {
    std::vector<std::size_t> order(tokens.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return place_of_[tokens[a].row] < place_of_[tokens[b].row]; });
    std::vector<const Bound*> groups;  // in the order of their first places
    const auto rank = [&](std::size_t i) {
      return std::find(groups.begin(), groups.end(), bound_of(tokens[i])) - groups.begin();
    };
    for (const std::size_t i : order)
      if (static_cast<std::size_t>(rank(i)) == groups.size()) groups.push_back(bound_of(tokens[i]));
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return rank(a) < rank(b); });
    for (std::size_t place = 0; place < order.size(); ++place) exchange(place_of_[tokens[order[place]].row], place);
    return order;
  }

  void exchange(std::size_t a, std::size_t b) {
    if (a == b) return;
    const auto used = static_cast<std::size_t>(std::min(slots_, std::max(places_[a].filled, places_[b].filled)));
    const std::size_t bytes = used * position_bytes();
    for (const ZeroMemory& cache : caches_)
      for (std::int64_t head = 0; head < io_.kv_heads; ++head)
        std::swap_ranges(at(cache, a, head), at(cache, a, head) + bytes, at(cache, b, head));
    std::swap(places_[a], places_[b]);
    for (std::size_t& place : place_of_) place = place == a ? b : place == b ? a : place;
  }

  OrtHeld tensor(const void* data, std::size_t bytes, const std::vector<std::int64_t>& shape,
                 ONNXTensorElementDataType type) const {
    return {runtime_, runtime_.tensor(const_cast<void*>(data), bytes, shape, type)};
  }
  void input(const Bound& bound, const std::string& name, const OrtHeld& value) const {
    check(runtime_.api().BindInput(bound.binding, name.c_str(), value.get()));
  }

  std::shared_ptr<Bound> bound(const Lora* lora) const {
    auto made = std::make_shared<Bound>(*loaded_, layout_, lora);
    const auto& inputs = loaded_->contract.inputs;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<std::int64_t> shape{inputs[i].rows, inputs[i].columns};
      const auto bytes = static_cast<std::size_t>(shape[0] * shape[1] * io_.itemsize());
      input(*made, inputs[i].name, tensor(made->bytes.data() + layout_.offset(i), bytes, shape, loaded_->type()));
    }
    return made;
  }

  /// Run `count` places from `first` on: `ids_`, `positions_`, `starts_` and `indices_` say what.
  void execute(const Bound& bound, std::size_t first, std::size_t count) {
    const auto rows = static_cast<std::int64_t>(count), length = static_cast<std::int64_t>(ids_.size() / count);
    const auto caches = io_.caches();
    const std::size_t bytes = count * place_bytes();
    for (std::size_t i = 0; i < caches.size(); ++i) {
      const OrtHeld value = tensor(caches_[i].data() + first * place_bytes(), bytes,
                                   {rows, io_.kv_heads, slots_, io_.head_dim}, loaded_->type());
      input(bound, caches[i].first, value);
      check(runtime_.api().BindOutput(bound.binding, caches[i].second.c_str(), value.get()));
    }
    const auto whole = [&](const char* name, const std::vector<std::int64_t>& values, const std::vector<std::int64_t>& shape) {
      input(bound, name, tensor(values.data(), 8 * values.size(), shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    };
    whole("input_ids", ids_, {rows, length});
    whole("position_ids", positions_, {rows, length});
    whole("write_index", starts_, {rows});
    whole("logits_index", indices_, {rows, 1});
    const auto width = count * static_cast<std::size_t>(io_.vocabulary);
    const void* out = raw_logits_.empty() ? static_cast<const void*>(logits_.data()) : raw_logits_.data();
    const OrtHeld value = tensor(out, width * static_cast<std::size_t>(io_.itemsize()), {rows, 1, io_.vocabulary}, loaded_->type());
    check(runtime_.api().BindOutput(bound.binding, "logits", value.get()));
    check(runtime_.api().RunWithBinding(loaded_->model.session(), nullptr, bound.binding));
    if (!raw_logits_.empty()) to_float32(io_.activations, raw_logits_.data(), width, logits_.data());
  }

  std::shared_ptr<Loaded> loaded_;
  const DecoderIO& io_;
  const OrtRuntime& runtime_;
  LoraLayout layout_;
  std::int64_t slots_ = 0, capacity_ = 0;
  std::vector<ZeroMemory> caches_;      // of each cache tensor: place after place
  std::vector<Place> places_;
  std::vector<std::size_t> place_of_;   // of each row; the last one is a spare where the number of rows is odd
  Limit limit_;
  std::vector<std::int64_t> ids_, positions_, starts_, indices_;
  std::vector<float> logits_, step_logits_;  // of one run; of all runs of a step
  std::vector<std::uint16_t> raw_logits_;
};

}  // namespace

std::unique_ptr<Rows> make_ort_rows(const std::shared_ptr<BundleState>& bundle, std::size_t rows, const SessionOptions& options) {
  return std::make_unique<OrtRows>(load_cpu_form(bundle, options), rows, options.context);
}

}  // namespace coatrt::detail
