// What is wrong with arguments, in the same words for every caller: TensorFlow, XLA and Python. Each function returns
// one sentence with what was received, or "" when nothing is wrong.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_ARGUMENTS_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_ARGUMENTS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "nearest_anchor.h"

namespace aib_tf {

// (3,) for one dimension, (1, ?) where the size of one is not known, as Python writes shapes.
inline std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] < 0 ? std::string("?") : std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// `shape` has -1 for a size that is not known.
inline std::string ProblemOfAnchorShape(const std::vector<int64_t>& shape) {
  if (shape.size() != 1) {
    return "`anchors` must be a vector (Q,). Received: anchors.shape=" + ShapeText(shape);
  }
  if (shape[0] == 0 || shape[0] > kMaxAnchors) {
    return "`anchors` must have 1 to " + std::to_string(kMaxAnchors) +
           " elements. Received: anchors.shape=" + ShapeText(shape);
  }
  return "";
}

// The types by their names in NumPy and TensorFlow: "float16", "bfloat16", "float32", "float64".
inline std::string ProblemOfTypes(const std::string& x, const std::string& anchors) {
  if (x != "float16" && x != "bfloat16" && x != "float32" && x != "float64") {
    return "`x` must be one of float16, bfloat16, float32, float64. Received: x.dtype=" + x;
  }
  const std::string expected = x == "float64" ? "float64" : "float32";
  if (anchors != expected) {
    return "`anchors` must be " + expected + " when `x` is " + x + "; cast one of them. Received: anchors.dtype=" +
           anchors;
  }
  return "";
}

template <typename A>
inline std::string ProblemOfAnchorValues(const A* anchors, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if (!IsFinite(anchors[k])) {
      const char* value = anchors[k] != anchors[k] ? "nan" : anchors[k] > 0 ? "inf" : "-inf";
      return "`anchors` must be finite. Received: anchors[" + std::to_string(k) + "]=" + value;
    }
  }
  return "";
}

inline std::string ProblemOfScalar(const std::string& name, const std::vector<int64_t>& shape) {
  if (shape.empty()) return "";
  return "`" + name + "` must be a scalar. Received: " + name + ".shape=" + ShapeText(shape);
}

inline std::string ProblemOfSameShape(const std::string& name, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& x_shape) {
  if (shape == x_shape) return "";
  return "`" + name + "` must have the shape of `x`, " + ShapeText(x_shape) + ". Received: " + name +
         ".shape=" + ShapeText(shape);
}

// `element` of index, which is `position` in row-major order, is not in [0, num_anchors).
inline std::string ProblemOfIndex(int64_t position, int32_t element, const std::vector<int64_t>& shape,
                                  int64_t num_anchors) {
  std::string place;
  for (size_t i = shape.size(); i > 0; --i) {
    place = std::to_string(position % shape[i - 1]) + (place.empty() ? "" : ", ") + place;
    position /= shape[i - 1];
  }
  return "`index` must be in [0, " + std::to_string(num_anchors) + "). Received: index[" +
         (place.empty() ? "()" : place) + "]=" + std::to_string(element);
}

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_ARGUMENTS_H_
