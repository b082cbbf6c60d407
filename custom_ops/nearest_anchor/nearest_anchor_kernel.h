// The kernels: the rules of nearest_anchor.h applied to whole arrays, on the CPU and on CUDA devices. No framework:
// the TensorFlow op and the pybind11 module both call what is declared here.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_KERNEL_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_KERNEL_H_

#include <cstddef>
#include <cstdint>
#include <functional>

#include "nearest_anchor.h"

namespace aib_tf {

// Runs body(0), ..., body(tasks - 1), in any order and on any threads, and returns when all are done.
// `nanoseconds` is about what one task takes.
using ParallelFor =
    std::function<void(int64_t tasks, int64_t nanoseconds, const std::function<void(int64_t task)>& body)>;

// T, the type of x, is Half, BFloat16, float or double; A, the type of anchors, is double for double x, else float.
//
// x, quantized, index: n elements, n >= 0. anchors: num_anchors finite elements, 1 <= num_anchors <= kMaxAnchors.
// loss: one element, mean((x - anchors[index])^2); 0 for n = 0. The results do not depend on the number of threads
// or on the instruction set.
template <typename T, typename A>
void NearestAnchorCpu(const T* x, int64_t n, const A* anchors, int num_anchors, T* quantized, int32_t* index, A* loss,
                      const ParallelFor& parallel_for);

// d_quantized, d_x: n elements; d_codebook, d_commitment: the gradients of the two losses, scalars; d_anchors:
// num_anchors elements. d_x may be the same array as d_quantized. Returns the position of the first element of index
// that is not in [0, num_anchors), or -1 when there is none; the outputs are not defined in the first case. (Where both
// losses have a gradient of 0, index is not read.)
template <typename T, typename A>
int64_t NearestAnchorGradCpu(const T* x, int64_t n, const A* anchors, int num_anchors, const int32_t* index,
                             const T* d_quantized, A d_codebook, A d_commitment, T* d_x, A* d_anchors,
                             const ParallelFor& parallel_for);

// The instruction set that the CPU kernels use: "avx512", "avx2" or "baseline". It is chosen once, from what the
// processor has and, where the environment sets it, AIB_TF_CPU (to one of the three names, for tests).
const char* CpuInstructionSet();

#if AIB_TF_CUDA

// The same on a CUDA device: every pointer is to device memory (also loss, d_codebook, d_commitment), the work is
// queued on `stream` (a cudaStream_t) and nothing waits for it. `workspace` is device memory of at least the number of
// bytes that the function before it returns, aligned to 256 bytes. The return value is 0 or a cudaError_t.
//
// A device cannot report an error without waiting. Where anchors are not finite, quantized and the loss are NaN and
// index is 0; an element of index outside of [0, num_anchors) gives a NaN in d_x and counts for no anchor.
template <typename T, typename A>
size_t NearestAnchorCudaWorkspace(int64_t n, int num_anchors);

template <typename T, typename A>
int NearestAnchorCuda(const T* x, int64_t n, const A* anchors, int num_anchors, T* quantized, int32_t* index,
                      A* codebook_loss, A* commitment_loss, void* workspace, void* stream);

template <typename T, typename A>
size_t NearestAnchorGradCudaWorkspace(int64_t n, int num_anchors);

template <typename T, typename A>
int NearestAnchorGradCuda(const T* x, int64_t n, const A* anchors, int num_anchors, const int32_t* index,
                          const T* d_quantized, const A* d_codebook, const A* d_commitment, T* d_x, A* d_anchors,
                          void* workspace, void* stream);

#endif  // AIB_TF_CUDA

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_KERNEL_H_
