// The XLA lowerings of the ops, for tf.function(jit_compile=True). They restate the rules of nearest_anchor.h in the
// operations of XLA, and tests hold the two equal. XLA cannot raise an error for the values of anchors: those that are
// not finite give NaN. The number of anchors is known when XLA compiles; that of x need not be.

#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nearest_anchor.h"
#include "nearest_anchor_arguments.h"
#include "tensorflow/core/public/version.h"
#if TF_MAJOR_VERSION == 2 && TF_MINOR_VERSION == 19
// This package of TensorFlow lacks an LLVM header for a class that its other headers name, and nothing here uses.
#define XLA_STREAM_EXECUTOR_GPU_TMA_METADATA_H_
namespace stream_executor::gpu {
class TmaDescriptor {};
}  // namespace stream_executor::gpu
#endif
#include "nearest_anchor_status.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/types.h"
#include "xla/shape.h"
#include "xla/shape_util.h"
#include "xla/xla_data.pb.h"
#if __has_include("xla/hlo/builder/xla_builder.h")
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/comparators.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/hlo/builder/xla_computation.h"
#else  // TensorFlow 2.18
#include "xla/client/lib/arithmetic.h"
#include "xla/client/lib/comparators.h"
#include "xla/client/lib/constants.h"
#include "xla/client/xla_builder.h"
#include "xla/client/xla_computation.h"
#endif

namespace aib_tf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;
using xla::PrimitiveType;
using xla::ScalarLike;
using xla::Shape;
using xla::ShapeUtil;
using xla::XlaBuilder;
using xla::XlaComputation;
using xla::XlaOp;

// Up to so many anchors, x is compared with each of them; for more, a search is faster (on a CPU, both take the same
// time at about 70).
constexpr int64_t kMostCompared = 64;

// A search first compares x with the lowest anchor of each of so many parts. This reads nothing but x; of the halvings
// that follow, each one reads another anchor for every x. A power of two, at most kMostCompared.
constexpr int64_t kParts = 16;

// ------------------------------------------------------------------------------------------------ checking arguments

std::vector<int64_t> Sizes(const Shape& shape) {
  return std::vector<int64_t>(shape.dimensions().begin(), shape.dimensions().end());
}

// ------------------------------------------------------------------------------------------------------ small pieces

XlaOp IsNan(XlaOp x) { return xla::Ne(x, x); }
XlaOp InfinityLike(XlaOp x) { return ScalarLike(x, std::numeric_limits<double>::infinity()); }
XlaOp NanLike(XlaOp x) { return ScalarLike(x, std::numeric_limits<double>::quiet_NaN()); }

int64_t Rank(const Shape& shape) { return static_cast<int64_t>(shape.dimensions().size()); }

std::vector<int64_t> AllDimensions(const Shape& shape) {
  std::vector<int64_t> dimensions(shape.dimensions().size());
  std::iota(dimensions.begin(), dimensions.end(), 0);
  return dimensions;
}

// What a mean over x is divided by: the number of its elements, but 1 for none. XLA knows only a bound of some sizes,
// after tf.boolean_mask for example; those are asked for at run time.
XlaOp CountForMean(XlaOp x, const Shape& shape) {
  XlaOp count = xla::ConstantR0<double>(x.builder(), 1);
  for (int64_t i = 0; i < Rank(shape); ++i) {
    const XlaOp size = shape.is_dynamic_dimension(i)
                           ? xla::ConvertElementType(xla::GetDimensionSize(x, i), xla::F64)
                           : ScalarLike(count, static_cast<double>(shape.dimensions(i)));
    count = xla::Mul(count, size);
  }
  return xla::Max(count, ScalarLike(count, 1));
}

// vector[k], a scalar.
XlaOp Element(XlaOp vector, int64_t k) { return xla::Reshape(xla::SliceInDim(vector, k, k + 1, 1, 0), {}); }

// table[slots], where `shape` has the sizes of slots. XLA reads the nearest end of the table for slots outside of it.
XlaOp Take(XlaOp table, XlaOp slots, const Shape& shape) {
  xla::GatherDimensionNumbers dimensions;
  dimensions.add_collapsed_slice_dims(0);
  dimensions.add_start_index_map(0);
  dimensions.set_index_vector_dim(Rank(shape));
  return xla::Gather(table, slots, dimensions, /*slice_sizes=*/{1});
}

// A computation of one parameter that another one, which `parent` builds, calls.
template <typename Body>
XlaComputation Computation(XlaBuilder* parent, const char* name, const Shape& parameter, const Body& body) {
  const std::unique_ptr<XlaBuilder> builder = parent->CreateSubBuilder(name);
  const XlaOp result = body(xla::Parameter(builder.get(), 0, parameter, "operand"));
  absl::StatusOr<XlaComputation> computation = builder->Build(result);
  if (computation.ok()) return *std::move(computation);
  parent->ReportError(computation.status());
  return XlaComputation();
}

// ------------------------------------------------------------------------------------------------- the nearest anchor

// argmin_k |x - anchors[k]| as it stands there.
XlaOp CompareWithEach(XlaOp x, XlaOp anchors, int64_t num_anchors) {
  const auto number = [&](int64_t k) { return xla::ConstantR0<int32_t>(x.builder(), static_cast<int32_t>(k)); };
  const auto distance = [&](int64_t k) { return xla::Abs(xla::Sub(x, Element(anchors, k))); };
  XlaOp least = distance(0);
  XlaOp index = xla::Select(IsNan(x), number(0), number(0));  // zeros in the shape of x
  for (int64_t k = 1; k < num_anchors; ++k) {
    const XlaOp other = distance(k);
    const XlaOp is_nearer = xla::Lt(other, least);
    least = xla::Select(is_nearer, other, least);
    index = xla::Select(is_nearer, number(k), index);
  }
  return index;
}

// The same for many anchors, in their ascending order. The equally near ones are a run of slots around the place of x,
// and the lowest index in the run is the answer. Nearly all runs have one slot, or the two on either side of x.
class Search {
 public:
  // ascending: more than kMostCompared anchors in ascending order; order: which ones they are; x_shape: the shape and
  // the type of x.
  Search(XlaOp ascending, XlaOp order, int64_t num_anchors, const Shape& x_shape)
      : ascending_(ascending),
        order_(order),
        num_anchors_(num_anchors),
        x_shape_(x_shape),
        slot_shape_(ShapeUtil::ChangeElementType(x_shape, xla::S32)),
        ascending_shape_(ShapeUtil::MakeShape(x_shape.element_type(), {num_anchors})),
        order_shape_(ShapeUtil::MakeShape(xla::S32, {num_anchors})) {
    while (int64_t{1} << levels_ < num_anchors) ++levels_;
  }

  // The index is not defined where x is NaN.
  XlaOp IndexOf(XlaOp x) const {
    const XlaOp below = LastNotAbove(x);
    const XlaOp above = xla::Min(xla::Add(below, ScalarLike(below, 1)), ScalarLike(below, num_anchors_ - 1));
    const XlaOp to_below = Distance(x, ascending_, below), to_above = Distance(x, ascending_, above);
    const XlaOp least = xla::Min(to_below, to_above);
    const XlaOp first = xla::Select(xla::Eq(to_below, least), below, above);
    const XlaOp last = xla::Select(xla::Eq(to_above, least), above, below);
    const XlaOp index = xla::Min(Take(order_, first, slot_shape_), Take(order_, last, slot_shape_));
    // Runs are longer at duplicates, and where x is so far away that rounding makes distances equal.
    const XlaOp one = ScalarLike(first, 1);
    const XlaOp any_is_longer = xla::Any(xla::Or(IsEquallyNear(x, least, ascending_, xla::Sub(first, one)),
                                                 IsEquallyNear(x, least, ascending_, xla::Add(last, one))));
    XlaBuilder* builder = x.builder();
    // TensorFlow 2.18 lets an operand of a branch have unknown sizes only in a tuple.
    return xla::Conditional(
        any_is_longer, xla::Tuple(builder, {x, least, first, last, ascending_, order_}),
        Computation(builder, "index_of_long_runs",
                    ShapeUtil::MakeTupleShape(
                        {x_shape_, x_shape_, slot_shape_, slot_shape_, ascending_shape_, order_shape_}),
                    [&](XlaOp operand) { return IndexOfLongRuns(operand); }),
        xla::Tuple(builder, {index}),
        Computation(builder, "index_of_short_runs", ShapeUtil::MakeTupleShape({slot_shape_}),
                    [](XlaOp operand) { return xla::GetTupleElement(operand, 0); }));
  }

 private:
  // The highest slot whose anchor is not above x, or 0.
  XlaOp LastNotAbove(XlaOp x) const {
    const int64_t size = int64_t{1} << levels_;
    const XlaOp table = xla::PadInDim(ascending_, InfinityLike(ascending_), 0, 0, size - num_anchors_);
    int64_t step = size / kParts;
    XlaOp part;
    for (int64_t i = 1; i < kParts; ++i) {
      const XlaOp is_reached = xla::ConvertElementType(xla::Ge(x, Element(table, i * step)), xla::S32);
      part = i == 1 ? is_reached : xla::Add(part, is_reached);
    }
    XlaOp slot = xla::Mul(part, ScalarLike(part, step));
    while (step > 1) {
      step /= 2;
      const XlaOp next = xla::Add(slot, ScalarLike(slot, step));
      slot = xla::Select(xla::Ge(x, Take(table, next, slot_shape_)), next, slot);
    }
    return slot;
  }

  XlaOp Distance(XlaOp x, XlaOp ascending, XlaOp slot) const {
    return xla::Abs(xla::Sub(x, Take(ascending, slot, slot_shape_)));
  }

  XlaOp IsEquallyNear(XlaOp x, XlaOp least, XlaOp ascending, XlaOp slot) const {
    const XlaOp exists = xla::And(xla::Ge(slot, ScalarLike(slot, 0)), xla::Lt(slot, ScalarLike(slot, num_anchors_)));
    return xla::And(exists, xla::Eq(Distance(x, ascending, slot), least));
  }

  // Widens all runs to their ends: distances do not fall on the way out, so an equal distance after a step means equal
  // ones all along it. The steps are powers of two, from the largest one. They are a loop because XLA compiles that
  // much faster than the steps one by one.
  XlaOp IndexOfLongRuns(XlaOp operand) const {
    const auto part = [](XlaOp tuple, int64_t i) { return xla::GetTupleElement(tuple, i); };
    const Shape shape = ShapeUtil::MakeTupleShape({x_shape_, x_shape_, slot_shape_, slot_shape_, ascending_shape_,
                                                   ShapeUtil::MakeShape(xla::S32, {})});
    const auto goes_on = [&](XlaOp state) {
      const XlaOp level = part(state, 5);
      return xla::Lt(level, ScalarLike(level, levels_));
    };
    const auto widen = [&](XlaOp state) {
      const XlaOp x = part(state, 0), least = part(state, 1), first = part(state, 2), last = part(state, 3);
      const XlaOp ascending = part(state, 4), level = part(state, 5);
      const XlaOp step = xla::ShiftRightLogical(ScalarLike(level, int64_t{1} << (levels_ - 1)), level);
      const XlaOp lower = xla::Sub(first, step), upper = xla::Add(last, step);
      const XlaOp lower_is_near = IsEquallyNear(x, least, ascending, lower);
      const XlaOp upper_is_near = IsEquallyNear(x, least, ascending, upper);
      return xla::Tuple(state.builder(), {x, least, xla::Select(lower_is_near, lower, first),
                                          xla::Select(upper_is_near, upper, last), ascending,
                                          xla::Add(level, ScalarLike(level, 1))});
    };
    XlaBuilder* builder = operand.builder();
    const XlaOp start = xla::Tuple(builder, {part(operand, 0), part(operand, 1), part(operand, 2), part(operand, 3),
                                             part(operand, 4), xla::ConstantR0<int32_t>(builder, 0)});
    const XlaOp end = xla::While(Computation(builder, "goes_on", shape, goes_on),
                                 Computation(builder, "widen", shape, widen), start);
    return LowestIndex(part(operand, 5), part(end, 2), part(end, 3));
  }

  // The lowest index of the slots from first to last: two stretches, which may overlap, of as many slots as the largest
  // power of two that fits, cover them.
  XlaOp LowestIndex(XlaOp order, XlaOp first, XlaOp last) const {
    std::vector<XlaOp> rows = {order};  // rows[level][slot] is the lowest index of 2^level slots from this one
    for (int level = 0; level < levels_; ++level) {
      const int64_t step = int64_t{1} << level;
      const XlaOp none = ScalarLike(order, std::numeric_limits<int32_t>::max());
      rows.push_back(xla::Min(rows.back(), xla::PadInDim(xla::SliceInDim(rows.back(), step, num_anchors_, 1, 0), none,
                                                         /*dimno=*/0, /*pad_lo=*/0, /*pad_hi=*/step)));
    }
    const XlaOp table = xla::ConcatInDim(order.builder(), rows, 0);
    const XlaOp after = xla::Add(last, ScalarLike(last, 1));
    const XlaOp level = xla::Sub(ScalarLike(first, 31), xla::Clz(xla::Sub(after, first)));
    const XlaOp row = xla::Mul(level, ScalarLike(level, num_anchors_));
    const XlaOp second = xla::Sub(after, xla::ShiftLeft(ScalarLike(level, 1), level));
    return xla::Min(Take(table, xla::Add(row, first), slot_shape_), Take(table, xla::Add(row, second), slot_shape_));
  }

  const XlaOp ascending_, order_;
  const int64_t num_anchors_;
  const Shape x_shape_, slot_shape_, ascending_shape_, order_shape_;
  int levels_ = 0;  // the lowest number for which there are no more than 2^levels anchors
};

// ------------------------------------------------------------------------------------------------------ the lowerings

class NearestAnchorXlaOpBase : public XlaOpKernel {
 public:
  explicit NearestAnchorXlaOpBase(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckTypes(construction));
  }

  void Compile(XlaOpKernelContext* context) override {
    OP_REQUIRES_VALUE(const Shape x_shape, context, context->InputXlaShape(0));
    OP_REQUIRES_VALUE(const Shape anchors_shape, context, context->InputXlaShape(1));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfAnchorShape(Sizes(anchors_shape))));
    OP_REQUIRES(context, anchors_shape.is_static(),
                absl::InvalidArgumentError("`anchors` must have a number of elements that is known when XLA compiles. "
                                           "Received: anchors.shape=(?,)"));
    Lower(context, x_shape, anchors_shape.element_type(), anchors_shape.dimensions(0));
  }

 private:
  // arithmetic: the type of anchors, which all is computed in.
  virtual void Lower(XlaOpKernelContext* context, const Shape& x_shape, PrimitiveType arithmetic,
                     int64_t num_anchors) = 0;
};

class NearestAnchorXlaOp final : public NearestAnchorXlaOpBase {
 public:
  using NearestAnchorXlaOpBase::NearestAnchorXlaOpBase;

 private:
  void Lower(XlaOpKernelContext* context, const Shape& x_shape, PrimitiveType arithmetic,
             int64_t num_anchors) override {
    XlaBuilder* builder = context->builder();
    const XlaOp x = context->Input(0), wide_x = xla::ConvertElementType(x, arithmetic);
    const XlaOp are_finite = xla::Not(xla::Any(xla::Not(xla::IsFinite(context->Input(1)))));
    const XlaOp anchors = xla::Select(are_finite, context->Input(1), NanLike(context->Input(1)));

    XlaOp index = NearestIndex(wide_x, anchors, ShapeUtil::ChangeElementType(x_shape, arithmetic), num_anchors);
    index = xla::Select(xla::Or(IsNan(wide_x), xla::Not(are_finite)), ScalarLike(index, 0), index);
    const XlaOp nearest = Take(anchors, index, x_shape);
    const XlaOp quantized = xla::Select(IsNan(x), x, xla::ConvertElementType(nearest, x_shape.element_type()));

    const XlaOp difference = xla::Sub(wide_x, nearest);
    const XlaOp squares = xla::ConvertElementType(xla::Mul(difference, difference), xla::F64);
    const XlaOp sum = xla::Reduce(squares, ScalarLike(squares, 0), xla::CreateScalarAddComputation(xla::F64, builder),
                                  AllDimensions(x_shape));
    const XlaOp loss = xla::ConvertElementType(xla::Div(sum, CountForMean(x, x_shape)), arithmetic);
    context->SetOutput(0, quantized);
    context->SetOutput(1, index);
    context->SetOutput(2, loss);
    context->SetOutput(3, loss);
  }

  // shape: that of x, with its type. The index is not defined where x or the anchors are NaN.
  static XlaOp NearestIndex(XlaOp x, XlaOp anchors, const Shape& shape, int64_t num_anchors) {
    XlaBuilder* builder = x.builder();
    const PrimitiveType type = shape.element_type();
    const XlaOp infinity = InfinityLike(x), minus_infinity = xla::Neg(infinity);
    // An infinite x is as far from one anchor as from another. It stands on the one that it goes to instead.
    const auto without_infinities = [&](XlaOp smallest, XlaOp largest) {
      return xla::Select(xla::Eq(x, infinity), largest, xla::Select(xla::Eq(x, minus_infinity), smallest, x));
    };
    if (num_anchors <= kMostCompared) {
      const XlaOp smallest =
          xla::Reduce(anchors, infinity, xla::CreateScalarMinComputation(type, builder), /*dimensions_to_reduce=*/{0});
      const XlaOp largest = xla::Reduce(anchors, minus_infinity, xla::CreateScalarMaxComputation(type, builder),
                                        /*dimensions_to_reduce=*/{0});
      return CompareWithEach(without_infinities(smallest, largest), anchors, num_anchors);
    }
    // To xla::Lt, and not to the total order that XLA otherwise sorts by, -0 and 0 are the same. A stable sort keeps
    // the lowest index of equal anchors first.
    const XlaComputation is_less =
        xla::CreateScalarComparisonComputation("is_less", {type, xla::S32}, {xla::Lt, std::nullopt}, builder);
    const XlaOp sorted = xla::Sort({anchors, xla::Iota(builder, xla::S32, num_anchors)}, is_less, /*dimension=*/0,
                                   /*is_stable=*/true);
    const XlaOp ascending = xla::GetTupleElement(sorted, 0), order = xla::GetTupleElement(sorted, 1);
    const XlaOp finite_x = without_infinities(Element(ascending, 0), Element(ascending, num_anchors - 1));
    return Search(ascending, order, num_anchors, shape).IndexOf(finite_x);
  }
};

class NearestAnchorGradXlaOp final : public NearestAnchorXlaOpBase {
 public:
  explicit NearestAnchorGradXlaOp(OpKernelConstruction* construction)
      : NearestAnchorXlaOpBase(construction),
        is_for_cpu_(construction->device_type() == tensorflow::DeviceType(tensorflow::DEVICE_CPU_XLA_JIT)) {}

 private:
  void Lower(XlaOpKernelContext* context, const Shape& x_shape, PrimitiveType arithmetic,
             int64_t num_anchors) override {
    OP_REQUIRES_VALUE(const Shape index_shape, context, context->InputXlaShape(2));
    OP_REQUIRES_VALUE(const Shape d_quantized_shape, context, context->InputXlaShape(3));
    OP_REQUIRES_VALUE(const Shape d_codebook_loss_shape, context, context->InputXlaShape(4));
    OP_REQUIRES_VALUE(const Shape d_commitment_loss_shape, context, context->InputXlaShape(5));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfSameShape("index", Sizes(index_shape), Sizes(x_shape))));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfSameShape("d_quantized", Sizes(d_quantized_shape), Sizes(x_shape))));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfScalar("d_codebook_loss", Sizes(d_codebook_loss_shape))));
    OP_REQUIRES_OK(context, AsStatus(ProblemOfScalar("d_commitment_loss", Sizes(d_commitment_loss_shape))));

    const XlaOp x = context->Input(0), anchors = context->Input(1), index = context->Input(2);
    const XlaOp d_quantized = context->Input(3), d_codebook_loss = context->Input(4);
    const XlaOp d_commitment_loss = context->Input(5);
    const XlaOp zero = ScalarLike(anchors, 0);

    const XlaOp difference = xla::Sub(xla::ConvertElementType(x, arithmetic), Take(anchors, index, x_shape));
    const XlaOp count = xla::ConvertElementType(CountForMean(x, x_shape), arithmetic);
    const XlaOp twice_mean = xla::Mul(ScalarLike(count, 2), xla::Div(ScalarLike(count, 1), count));

    const XlaOp sum = xla::Add(xla::ConvertElementType(d_quantized, arithmetic),
                               xla::Mul(xla::Mul(d_commitment_loss, twice_mean), difference));
    const XlaOp is_index =
        xla::And(xla::Ge(index, ScalarLike(index, 0)), xla::Lt(index, ScalarLike(index, num_anchors)));
    const XlaOp d_x = xla::Select(xla::Eq(d_commitment_loss, zero), d_quantized,
                                  xla::ConvertElementType(sum, x_shape.element_type()));

    const XlaOp pull = SumOfEachIndex(xla::Neg(difference), index, x_shape, num_anchors);
    const XlaOp d_anchors = xla::Select(
        xla::Eq(d_codebook_loss, zero), zero,
        xla::Mul(xla::Mul(d_codebook_loss, twice_mean), xla::ConvertElementType(pull, arithmetic)));
    context->SetOutput(0, xla::Select(is_index, d_x, NanLike(d_x)));
    context->SetOutput(1, d_anchors);
  }

  // Sums the values of each index in double precision; a float sum of a million values would hardly grow any more. What
  // has no index from 0 to num_anchors - 1 counts for none.
  //
  // A scatter does it on a CPU, where it is a plain loop. On a GPU it adds atomically: in an order that differs from
  // run to run, and the fewer the anchors are, the more threads wait for each other. So there, few anchors get a sum
  // each over all values, with 0 in place of those of the others, which XLA selects as it adds. (On a CPU it would
  // store them: N Q values.)
  XlaOp SumOfEachIndex(XlaOp values, XlaOp index, const Shape& shape, int64_t num_anchors) const {
    XlaBuilder* builder = values.builder();
    const XlaOp doubles = xla::ConvertElementType(values, xla::F64), zero = ScalarLike(doubles, 0);
    const XlaComputation add = xla::CreateScalarAddComputation(xla::F64, builder);
    if (!is_for_cpu_ && num_anchors <= kMostCompared && shape.is_static()) {
      const std::vector<int64_t> dimensions = AllDimensions(shape);
      std::vector<int64_t> sizes = Sizes(shape);
      sizes.push_back(num_anchors);
      const XlaOp k = xla::Iota(builder, ShapeUtil::MakeShape(xla::S32, sizes), Rank(shape));
      const XlaOp is_k = xla::Eq(xla::BroadcastInDim(index, sizes, dimensions), k);
      return xla::Reduce(xla::Select(is_k, xla::BroadcastInDim(doubles, sizes, dimensions), zero), zero, add,
                         dimensions);
    }
    xla::ScatterDimensionNumbers dimensions;
    dimensions.add_inserted_window_dims(0);
    dimensions.add_scatter_dims_to_operand_dims(0);
    dimensions.set_index_vector_dim(Rank(shape));
    return xla::Scatter(xla::Broadcast(zero, {num_anchors}), index, doubles, add, dimensions);
  }

  const bool is_for_cpu_;
};

// ------------------------------------------------------------------------------------------------------- registration

REGISTER_XLA_OP(Name("AibTf>NearestAnchor"), NearestAnchorXlaOp);
REGISTER_XLA_OP(Name("AibTf>NearestAnchorGrad"), NearestAnchorGradXlaOp);

// TensorFlow makes kernels of what is registered above once, when XLA is first used, and this library can be loaded
// after that. So the kernels are registered themselves, too: with a higher priority, for TensorFlow does not choose
// between two that have the same.
#define AIB_TF_REGISTER_XLA_KERNELS(device)                                                            \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchor").Device(device).Priority(1), NearestAnchorXlaOp); \
  REGISTER_KERNEL_BUILDER(Name("AibTf>NearestAnchorGrad").Device(device).Priority(1), NearestAnchorGradXlaOp);
AIB_TF_REGISTER_XLA_KERNELS(tensorflow::DEVICE_CPU_XLA_JIT)
AIB_TF_REGISTER_XLA_KERNELS(tensorflow::DEVICE_GPU_XLA_JIT)
#undef AIB_TF_REGISTER_XLA_KERNELS

}  // namespace
}  // namespace aib_tf
