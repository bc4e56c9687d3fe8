#include "ort/emitter.hpp"

#include <algorithm>

#include "coatrt/error.hpp"
#include "state.hpp"

namespace coatrt::detail {
namespace {

std::vector<std::string> texts(const Json& side, const char* key) {
  const Json* rows = find(side, key);
  if (rows == nullptr || !rows->is_array()) throw Error("hypernet.json lacks " + repr(key) + "; build the bundle again");
  std::vector<std::string> result;
  for (const Json& row : *rows) {
    if (!row.is_string()) throw Error("hypernet.json is garbled (" + repr(key) + "); build the bundle again");
    result.push_back(row.get<std::string>());
  }
  return result;
}

/// Refuse an output that is not what the contract says, before its memory is read.
void check_output(const OrtRuntime& runtime, const OrtValue* value, const Contract::Tensor& said) {
  const OrtApi& api = runtime.api();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  runtime.check(api.GetTensorTypeAndShape(value, &info), "the hypernetwork emits no tensor for " + said.name);
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> held(
      info, api.ReleaseTensorTypeAndShapeInfo);
  ONNXTensorElementDataType type{};
  std::size_t rank = 0;
  std::vector<std::int64_t> shape(2);
  runtime.check(api.GetTensorElementType(info, &type), said.name);
  runtime.check(api.GetDimensionsCount(info, &rank), said.name);
  if (rank == 2) runtime.check(api.GetDimensions(info, shape.data(), 2), said.name);
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || rank != 2 || shape[0] != said.rows || shape[1] != said.columns)
    throw Error("the hypernetwork emits " + said.name + " in another shape than the contract says; build the bundle again");
}

}  // namespace

Emitter::Emitter(BundleState& bundle) : contract_(bundle.contract()) {
  const Json side = bundle.json("hypernet.json", "hypernetwork side file");
  matrices_ = texts(side, "matrices");
  formats_ = texts(side, "formats");
  const bool apart = bundle.manifest.at("files").contains("hypernet.bin");
  OrtOptions options;
  options.threads = bundle.options.threads;
  model_ = std::make_shared<OrtModel>(bundle.ort(), bundle.graph("hypernet.onnx", apart ? "hypernet.bin" : ""), options);
}

std::vector<std::int64_t> Emitter::ids(const Configuration& configuration) const {
  std::vector<std::int64_t> result;
  for (const std::string& name : matrices_) {
    const auto given = configuration.formats.find(name);
    const std::string text = given == configuration.formats.end() ? "nothing" : given->second;
    const auto found = std::find(formats_.begin(), formats_.end(), text);
    if (found == formats_.end())
      throw Error(name + " is " + text + ", which the adapter was not trained for; allowed: " + join(formats_));
    result.push_back(found - formats_.begin());
  }
  return result;
}

Lora Emitter::emit(const Configuration& configuration) const {
  struct Values {  // in this order: the values go before the runtime that made them
    std::shared_ptr<OrtModel> model;
    std::vector<OrtHeld> held;
  };
  const OrtRuntime& runtime = model_->runtime();
  std::vector<std::int64_t> input = ids(configuration);
  const OrtHeld formats(runtime, runtime.tensor(input.data(), input.size() * sizeof(std::int64_t),
                                                {static_cast<std::int64_t>(input.size())},
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
  const char* input_name = "formats";
  const OrtValue* inputs[] = {formats.get()};
  std::vector<const char*> names;
  for (const auto& tensor : contract_.tensors) names.push_back(tensor.name.c_str());
  std::vector<OrtValue*> outputs(names.size(), nullptr);
  OrtStatus* status = runtime.api().Run(model_->session(), nullptr, &input_name, inputs, 1, names.data(), names.size(),
                                        outputs.data());
  auto values = std::make_shared<Values>();
  values->model = model_;
  values->held.reserve(outputs.size());
  for (OrtValue* value : outputs) values->held.emplace_back(runtime, value);
  runtime.check(status, "the hypernetwork does not run", "; build the bundle again");

  std::vector<LoraTensor> tensors;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const auto& said = contract_.tensors[i];
    check_output(runtime, outputs[i], said);
    void* data = nullptr;
    runtime.check(runtime.api().GetTensorMutableData(outputs[i], &data), said.name);
    tensors.push_back({said.name, said.rows, said.columns, static_cast<const float*>(data)});
  }
  return {std::move(tensors), std::move(values), configuration.hash()};
}

std::shared_ptr<Emitter> emitter_of(BundleState& bundle) {
  {
    const std::lock_guard lock(bundle.mutex);
    if (bundle.emitter) return bundle.emitter;
  }
  auto made = std::make_shared<Emitter>(bundle);  // outside the lock: it asks the bundle for files
  const std::lock_guard lock(bundle.mutex);
  if (!bundle.emitter) bundle.emitter = std::move(made);
  return bundle.emitter;
}

std::shared_ptr<OrtRuntime> BundleState::ort() {
  const std::lock_guard lock(mutex);
  if (!runtime) runtime = std::make_shared<OrtRuntime>(options.onnxruntime);
  return runtime;
}

}  // namespace coatrt::detail
