// The TensorFlow ops: what they take and give, and the kernels that run them. The gradient is attached in Python
// (aib_tf/ops/custom_op.py); nearest_anchor_xla.cc has the XLA lowerings.

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "nearest_anchor.h"
#include "nearest_anchor_arguments.h"
#include "nearest_anchor_kernel.h"
#include "nearest_anchor_status.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/util/work_sharder.h"

#if AIB_TF_CUDA
#include <cuda_runtime_api.h>

#include "xla/stream_executor/stream.h"
#endif

namespace aib_tf {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ------------------------------------------------------------------------------------------------ checking arguments

std::vector<int64_t> Sizes(const TensorShape& shape) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < shape.dims(); ++i) sizes.push_back(shape.dim_size(i));
  return sizes;
}

// The types and what is known of the shape of anchors. Where the rank is not known, nothing is wrong yet.
absl::Status CheckStatically(InferenceContext* context) {
  TF_RETURN_IF_ERROR(CheckTypes(context));
  const ShapeHandle anchors = context->input(1);
  if (!context->RankKnown(anchors)) return absl::OkStatus();
  std::vector<int64_t> sizes;
  for (int i = 0; i < context->Rank(anchors); ++i) sizes.push_back(context->Value(context->Dim(anchors, i)));
  return AsStatus(ProblemOfAnchorShape(sizes));
}

absl::Status NearestAnchorShape(InferenceContext* context) {
  TF_RETURN_IF_ERROR(CheckStatically(context));
  context->set_output(0, context->input(0));
  context->set_output(1, context->input(0));
  context->set_output(2, context->Scalar());
  context->set_output(3, context->Scalar());
  return absl::OkStatus();
}

absl::Status NearestAnchorGradShape(InferenceContext* context) {
  TF_RETURN_IF_ERROR(CheckStatically(context));
  ShapeHandle x = context->input(0), scalar;
  TF_RETURN_IF_ERROR(context->Merge(x, context->input(2), &x));
  TF_RETURN_IF_ERROR(context->Merge(x, context->input(3), &x));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(4), 0, &scalar));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(5), 0, &scalar));
  context->set_output(0, x);
  context->set_output(1, context->input(1));
  return absl::OkStatus();
}

// --------------------------------------------------------------------------------------------------------- the ops

REGISTER_OP("AibTf>NearestAnchor")
    .Input("x: T")
    .Input("anchors: A")
    .Output("quantized: T")
    .Output("index: int32")
    .Output("codebook_loss: A")
    .Output("commitment_loss: A")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("A: {float, double}")
    .SetShapeFn(NearestAnchorShape)
    .Doc(R"doc(
Replaces each element of x by its nearest anchor.

    index           = argmin_k |x - anchors[k]|, the lowest k of those equally near
    quantized       = anchors[index]
    codebook_loss   = mean((x - quantized)^2), 0 for empty x
    commitment_loss = codebook_loss

NaN in x stays NaN, with index 0; infinities go to the largest and the smallest anchor.

x: of any shape.
anchors: finite, in any order, of shape (Q,), 1 <= Q <= 65536; double for double x, otherwise float.
quantized: of the shape and type of x.
index: of the shape of x.
codebook_loss: a scalar.
commitment_loss: a scalar.
)doc");

REGISTER_OP("AibTf>NearestAnchorGrad")
    .Input("x: T")
    .Input("anchors: A")
    .Input("index: int32")
    .Input("d_quantized: T")
    .Input("d_codebook_loss: A")
    .Input("d_commitment_loss: A")
    .Output("d_x: T")
    .Output("d_anchors: A")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("A: {float, double}")
    .SetShapeFn(NearestAnchorGradShape)
    .Doc(R"doc(
The straight-through gradient of AibTf>NearestAnchor.

    d_x          = d_quantized + d_commitment_loss * 2 (x - anchors[index]) / N
    d_anchors[k] = d_codebook_loss * 2 / N * sum over index = k of (anchors[k] - x)

where N is the number of elements of x. A loss whose gradient is 0 adds nothing, also where x is infinite or NaN.

x: as in AibTf>NearestAnchor.
anchors: as in AibTf>NearestAnchor.
index: what AibTf>NearestAnchor gave, of the shape of x.
d_quantized: the gradient of quantized, of the shape of x.
d_codebook_loss: a scalar, the gradient of codebook_loss.
d_commitment_loss: a scalar, the gradient of commitment_loss.
d_x: of the shape and type of x.
d_anchors: of the shape and type of anchors.
)doc");

// ------------------------------------------------------------------------------------------------------ the kernels

// TensorFlow's types for T, and those of nearest_anchor.h, which are the same bits.
template <typename T>
struct Same {
  using type = T;
};
template <>
struct Same<Eigen::half> {
  using type = Half;
};
template <>
struct Same<tensorflow::bfloat16> {
  using type = BFloat16;
};

template <typename T>
const typename Same<T>::type* Read(const Tensor& tensor) {
  return reinterpret_cast<const typename Same<T>::type*>(tensor.flat<T>().data());
}
template <typename T>
typename Same<T>::type* Write(Tensor* tensor) {
  return reinterpret_cast<typename Same<T>::type*>(tensor->flat<T>().data());
}

template <typename T>
class NearestAnchorOpBase : public OpKernel {
 public:
  // The arithmetic type that goes with T. `A` is what the graph says.
  using A = std::conditional_t<std::is_same<T, double>::value, double, float>;

  explicit NearestAnchorOpBase(OpKernelConstruction* construction) : OpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckTypes(construction));
  }
};

template <typename T>
class NearestAnchorOp : public NearestAnchorOpBase<T> {
 public:
  using A = typename NearestAnchorOpBase<T>::A;
  using NearestAnchorOpBase<T>::NearestAnchorOpBase;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& anchors = context->input(1);
    OP_REQUIRES_OK(context, AsStatus(ProblemOfAnchorShape(Sizes(anchors.shape()))));
    Tensor *quantized, *index, *codebook_loss, *commitment_loss;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &quantized));
    OP_REQUIRES_OK(context, context->allocate_output(1, x.shape(), &index));
    OP_REQUIRES_OK(context, context->allocate_output(2, TensorShape({}), &codebook_loss));
    OP_REQUIRES_OK(context, context->allocate_output(3, TensorShape({}), &commitment_loss));
    Run(context, x, anchors, quantized, index, codebook_loss, commitment_loss);
  }

 protected:
  virtual void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* quantized, Tensor* index,
                   Tensor* codebook_loss, Tensor* commitment_loss) = 0;
};

template <typename T>
class NearestAnchorGradOp : public NearestAnchorOpBase<T> {
 public:
  using A = typename NearestAnchorOpBase<T>::A;
  using NearestAnchorOpBase<T>::NearestAnchorOpBase;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& anchors = context->input(1);
    OP_REQUIRES_OK(context, AsStatus(ProblemOfAnchorShape(Sizes(anchors.shape()))));
    const std::vector<int64_t> sizes = Sizes(x.shape());
    OP_REQUIRES_OK(context, AsStatus(ProblemOfSameShape("index", Sizes(context->input(2).shape()), sizes)));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfSameShape("d_quantized", Sizes(context->input(3).shape()), sizes)));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfScalar("d_codebook_loss", Sizes(context->input(4).shape()))));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfScalar("d_commitment_loss", Sizes(context->input(5).shape()))));
    Tensor *d_x, *d_anchors;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({3}, 0, x.shape(), &d_x));
    OP_REQUIRES_OK(context, context->allocate_output(1, anchors.shape(), &d_anchors));
    Run(context, x, anchors, d_x, d_anchors);
  }

 protected:
  virtual void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* d_x,
                   Tensor* d_anchors) = 0;
};

ParallelFor OnThreadsOf(OpKernelContext* context) {
  const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
  return [&workers](int64_t tasks, int64_t nanoseconds, const std::function<void(int64_t)>& body) {
    tensorflow::Shard(workers.num_threads, workers.workers, tasks, nanoseconds, [&body](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    });
  };
}

template <typename T>
class NearestAnchorCpuOp final : public NearestAnchorOp<T> {
 public:
  using A = typename NearestAnchorOp<T>::A;
  using NearestAnchorOp<T>::NearestAnchorOp;

 private:
  void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* quantized, Tensor* index,
           Tensor* codebook_loss, Tensor* commitment_loss) override {
    const A* values = Read<A>(anchors);
    const int count = static_cast<int>(anchors.NumElements());
    OP_REQUIRES_OK(context, AsStatus(ProblemOfAnchorValues(values, count)));
    A loss;
    NearestAnchorCpu<typename Same<T>::type, A>(Read<T>(x), x.NumElements(), values, count, Write<T>(quantized),
                                                Write<int32_t>(index), &loss, OnThreadsOf(context));
    codebook_loss->scalar<A>()() = loss;
    commitment_loss->scalar<A>()() = loss;
  }
};

template <typename T>
class NearestAnchorGradCpuOp final : public NearestAnchorGradOp<T> {
 public:
  using A = typename NearestAnchorGradOp<T>::A;
  using NearestAnchorGradOp<T>::NearestAnchorGradOp;

 private:
  void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* d_x, Tensor* d_anchors) override {
    const int32_t* index = Read<int32_t>(context->input(2));
    const int64_t bad = NearestAnchorGradCpu<typename Same<T>::type, A>(
        Read<T>(x), x.NumElements(), Read<A>(anchors), static_cast<int>(anchors.NumElements()), index,
        Read<T>(context->input(3)), context->input(4).scalar<A>()(), context->input(5).scalar<A>()(), Write<T>(d_x),
        Write<A>(d_anchors), OnThreadsOf(context));
    if (bad < 0) return;
    context->CtxFailure(
        AsStatus(ProblemOfIndex(bad, index[bad], Sizes(context->input(2).shape()), anchors.NumElements())));
  }
};

#define AIB_TF_REGISTER_CPU(T)                                                                                      \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchor").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),        \
                          NearestAnchorCpuOp<T>);                                                                   \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchorGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),    \
                          NearestAnchorGradCpuOp<T>);
AIB_TF_REGISTER_CPU(Eigen::half)
AIB_TF_REGISTER_CPU(tensorflow::bfloat16)
AIB_TF_REGISTER_CPU(float)
AIB_TF_REGISTER_CPU(double)
#undef AIB_TF_REGISTER_CPU

#if AIB_TF_CUDA

void* StreamOf(OpKernelContext* context) {
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

absl::Status CudaStatus(int error) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError("nearest_anchor could not start its CUDA kernels: " +
                             std::string(cudaGetErrorString(static_cast<cudaError_t>(error))) + " (CUDA error " +
                             std::to_string(error) + ")");
}

absl::Status AllocateWorkspace(OpKernelContext* context, size_t bytes, Tensor* workspace) {
  return context->allocate_temp(tensorflow::DT_UINT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
}

template <typename T>
class NearestAnchorCudaOp final : public NearestAnchorOp<T> {
 public:
  using A = typename NearestAnchorOp<T>::A;
  using NearestAnchorOp<T>::NearestAnchorOp;

 private:
  void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* quantized, Tensor* index,
           Tensor* codebook_loss, Tensor* commitment_loss) override {
    using U = typename Same<T>::type;
    const int count = static_cast<int>(anchors.NumElements());
    Tensor workspace;
    OP_REQUIRES_OK(context, AllocateWorkspace(context, NearestAnchorCudaWorkspace<U, A>(x.NumElements(), count),
                                              &workspace));
    OP_REQUIRES_OK(context, CudaStatus(NearestAnchorCuda<U, A>(
                                Read<T>(x), x.NumElements(), Read<A>(anchors), count, Write<T>(quantized),
                                Write<int32_t>(index), Write<A>(codebook_loss), Write<A>(commitment_loss),
                                workspace.flat<uint8_t>().data(), StreamOf(context))));
  }
};

template <typename T>
class NearestAnchorGradCudaOp final : public NearestAnchorGradOp<T> {
 public:
  using A = typename NearestAnchorGradOp<T>::A;
  using NearestAnchorGradOp<T>::NearestAnchorGradOp;

 private:
  void Run(OpKernelContext* context, const Tensor& x, const Tensor& anchors, Tensor* d_x, Tensor* d_anchors) override {
    using U = typename Same<T>::type;
    const int count = static_cast<int>(anchors.NumElements());
    Tensor workspace;
    OP_REQUIRES_OK(context, AllocateWorkspace(context, NearestAnchorGradCudaWorkspace<U, A>(x.NumElements(), count),
                                              &workspace));
    OP_REQUIRES_OK(context, CudaStatus(NearestAnchorGradCuda<U, A>(
                                Read<T>(x), x.NumElements(), Read<A>(anchors), count, Read<int32_t>(context->input(2)),
                                Read<T>(context->input(3)), Read<A>(context->input(4)), Read<A>(context->input(5)),
                                Write<T>(d_x), Write<A>(d_anchors), workspace.flat<uint8_t>().data(),
                                StreamOf(context))));
  }
};

#define AIB_TF_REGISTER_GPU(T)                                                                                      \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchor").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"),        \
                          NearestAnchorCudaOp<T>);                                                                  \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchorGrad").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"),    \
                          NearestAnchorGradCudaOp<T>);
AIB_TF_REGISTER_GPU(Eigen::half)
AIB_TF_REGISTER_GPU(tensorflow::bfloat16)
AIB_TF_REGISTER_GPU(float)
AIB_TF_REGISTER_GPU(double)
#undef AIB_TF_REGISTER_GPU

#endif  // AIB_TF_CUDA

}  // namespace
}  // namespace aib_tf
