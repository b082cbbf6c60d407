// A program that is linked with the op and names nothing of it, as TensorFlow Serving would be, can run it.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tensorflow/c/c_api.h"

namespace {

TF_Status* status;

void Check(const char* what) {
  if (TF_GetCode(status) == TF_OK) return;
  std::fprintf(stderr, "%s: %s\n", what, TF_Message(status));
  std::exit(1);
}

TF_Output Constant(TF_Graph* graph, const char* name, const std::vector<float>& values) {
  const int64_t size = values.size();
  TF_Tensor* tensor = TF_AllocateTensor(TF_FLOAT, &size, 1, size * sizeof(float));
  std::memcpy(TF_TensorData(tensor), values.data(), size * sizeof(float));
  TF_OperationDescription* description = TF_NewOperation(graph, "Const", name);
  TF_SetAttrType(description, "dtype", TF_FLOAT);
  TF_SetAttrTensor(description, "value", tensor, status);
  Check(name);
  const TF_Output output = {TF_FinishOperation(description, status), 0};
  Check(name);
  TF_DeleteTensor(tensor);
  return output;
}

}  // namespace

int main() {
  status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_OperationDescription* description = TF_NewOperation(graph, "AibTf>NearestAnchor", "nearest_anchor");
  TF_AddInput(description, Constant(graph, "x", {0.2f, 0.9f, -1.0f}));
  TF_AddInput(description, Constant(graph, "anchors", {1.0f, 0.0f}));
  TF_Operation* operation = TF_FinishOperation(description, status);
  Check("TF_FinishOperation");

  TF_SessionOptions* options = TF_NewSessionOptions();
  TF_Session* session = TF_NewSession(graph, options, status);
  Check("TF_NewSession");
  const TF_Output quantized = {operation, 0};
  TF_Tensor* result = nullptr;
  TF_SessionRun(session, nullptr, nullptr, nullptr, 0, &quantized, &result, 1, nullptr, 0, nullptr, status);
  Check("TF_SessionRun");

  const std::vector<float> expected = {0.0f, 1.0f, 0.0f};
  const bool same = TF_TensorByteSize(result) == expected.size() * sizeof(float) &&
                    std::memcmp(TF_TensorData(result), expected.data(), TF_TensorByteSize(result)) == 0;
  std::puts(same ? "The op ran." : "The op gave a wrong result.");

  TF_DeleteTensor(result);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return same ? 0 : 1;
}
