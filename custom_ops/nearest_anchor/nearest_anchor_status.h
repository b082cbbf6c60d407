// The checks of nearest_anchor_arguments.h as TensorFlow reports them, for the ops and for their XLA lowerings.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_STATUS_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_STATUS_H_

#include <string>

#include "absl/status/status.h"
#include "nearest_anchor_arguments.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace aib_tf {

inline absl::Status AsStatus(const std::string& problem) {
  return problem.empty() ? absl::OkStatus() : absl::InvalidArgumentError(problem);
}

// The name that Python knows a type by.
inline std::string TypeName(tensorflow::DataType type) {
  return type == tensorflow::DT_HALF     ? "float16"
         : type == tensorflow::DT_FLOAT  ? "float32"
         : type == tensorflow::DT_DOUBLE ? "float64"
                                         : tensorflow::DataTypeString(type);
}

// Whether the attributes T and A go together. Node: an InferenceContext or an OpKernelConstruction.
template <typename Node>
absl::Status CheckTypes(Node* node) {
  tensorflow::DataType x_type, anchors_type;
  TF_RETURN_IF_ERROR(node->GetAttr("T", &x_type));
  TF_RETURN_IF_ERROR(node->GetAttr("A", &anchors_type));
  return AsStatus(ProblemOfTypes(TypeName(x_type), TypeName(anchors_type)));
}

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_STATUS_H_
