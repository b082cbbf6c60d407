// Tests of the CUDA kernels against the CPU kernels and plain loops. They run in two ways:
//
//   without a device, in the emulation of nearest_anchor_cuda_emulation.h:
//     g++ -std=c++17 -O2 -ffp-contract=off -DAIB_TF_CUDA=1 nearest_anchor_cuda_test.cc nearest_anchor_kernel.cc
//   on a device, for example one of compute capability 9.0:
//     g++ -std=c++17 -O3 -ffp-contract=off -c nearest_anchor_kernel.cc
//     nvcc -std=c++17 -O3 --fmad=false -DAIB_TF_CUDA=1 -arch=sm_90 -x cu -c nearest_anchor_cuda_test.cc
//     nvcc nearest_anchor_cuda_test.o nearest_anchor_kernel.o
//
// The kernels are included, not linked, so that both ways to find an anchor can be asked for.

#include "nearest_anchor_kernel.cu.cc"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace aib_tf {
namespace {

int failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      if (++failures <= 20) {                                     \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                 \
        std::printf("\n");                                        \
      }                                                           \
    }                                                             \
  } while (false)

// ---------------------------------------------------------------------------------------------------- device memory

#if defined(__CUDACC__)
void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
unsigned char* Allocate(size_t bytes) {
  void* memory;
  Check(cudaMalloc(&memory, bytes));
  return static_cast<unsigned char*>(memory);
}
void Release(unsigned char* memory) { Check(cudaFree(memory)); }
void CopyToDevice(void* to, const void* from, size_t bytes) {
  Check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
void CopyToHost(void* to, const void* from, size_t bytes) {
  Check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
#else
unsigned char* Allocate(size_t bytes) { return static_cast<unsigned char*>(std::aligned_alloc(256, bytes)); }
void Release(unsigned char* memory) { std::free(memory); }
void CopyToDevice(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void CopyToHost(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#endif

// AddressSanitizer then sees reading of these bytes, too.
#if defined(__SANITIZE_ADDRESS__)
void Forbid(void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void Allow(void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
void Forbid(void*, size_t) {}
void Allow(void*, size_t) {}
#endif

// An array in device memory, `shift` elements past an aligned place, with bytes around it that must not change.
template <typename E>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count, size_t shift = 0) : count_(count), before_(kGuard + shift * sizeof(E)) {
    const size_t bytes = (before_ + count * sizeof(E) + kGuard + 255) / 256 * 256;
    noise_.resize(bytes);
    for (size_t i = 0; i < bytes; ++i) noise_[i] = static_cast<unsigned char>(0x5b + 31 * i);
    memory_ = Allocate(bytes);
    CopyToDevice(memory_, noise_.data(), bytes);
    Forbid(memory_, before_);
    Forbid(memory_ + before_ + count * sizeof(E), bytes - before_ - count * sizeof(E));
  }
  DeviceArray(const std::vector<E>& host, size_t shift = 0) : DeviceArray(host.size(), shift) {
    if (!host.empty()) CopyToDevice(get(), host.data(), host.size() * sizeof(E));
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() {
    Allow(memory_, noise_.size());
    Release(memory_);
  }

  E* get() const { return reinterpret_cast<E*>(memory_ + before_); }

  std::vector<E> Read(const char* name) const {
    std::vector<unsigned char> bytes(noise_.size());
    Allow(memory_, bytes.size());
    CopyToHost(bytes.data(), memory_, bytes.size());
    const size_t end = before_ + count_ * sizeof(E);
    bool intact = true;
    for (size_t i = 0; i < bytes.size(); ++i) intact = intact && ((i >= before_ && i < end) || bytes[i] == noise_[i]);
    EXPECT(intact, "bytes around %s were written", name);
    std::vector<E> host(count_);
    if (count_ > 0) std::memcpy(host.data(), bytes.data() + before_, count_ * sizeof(E));
    return host;
  }

 private:
  static constexpr size_t kGuard = 256;
  size_t count_, before_;
  std::vector<unsigned char> noise_;
  unsigned char* memory_;
};

// How the emulation runs the threads of the next calls; a device runs them as it likes.
void SetOrder(bool downwards, int resident_blocks) {
#if defined(__CUDACC__)
  static_cast<void>(downwards);
  static_cast<void>(resident_blocks);
#else
  Emulator::Get().downwards = downwards;
  Emulator::Get().resident_blocks = resident_blocks;
#endif
}

// ----------------------------------------------------------------------------------------------------------- values

std::mt19937_64 generator(7);

double Uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }

template <typename T, typename A>
std::vector<T> As(const std::vector<A>& values) {
  std::vector<T> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) Narrow(values[i], &result[i]);
  return result;
}

template <typename A>
std::vector<A> RandomNumbers(size_t count, double width = 1) {
  std::normal_distribution<double> normal(0, width);
  std::vector<A> values(count);
  for (A& value : values) value = static_cast<A>(normal(generator));
  return values;
}

// Random numbers, and among them what could go wrong: the anchors, the middles between them, the numbers beside both,
// both ends of the range of numbers, infinities, NaNs.
template <typename A>
std::vector<A> DifficultElements(size_t count, const std::vector<A>& anchors, bool with_nan) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity(), kMost = std::numeric_limits<A>::max();
  std::vector<A> values = RandomNumbers<A>(count, 1.5);
  std::vector<A> special = {0, A(-0.0), std::numeric_limits<A>::denorm_min(), kMost, -kMost, kInfinity, -kInfinity};
  if (with_nan) special.push_back(std::numeric_limits<A>::quiet_NaN());
  for (int i = 0; i < 300; ++i) {
    const A a = anchors[generator() % anchors.size()], b = anchors[generator() % anchors.size()];
    for (A value : {a, a / 2 + b / 2, a * A(1e7), a + A(1e9)}) {
      special.push_back(value);
      special.push_back(std::nextafter(value, kInfinity));
      special.push_back(std::nextafter(value, -kInfinity));
    }
  }
  for (size_t i = 0; i < count; i += 1 + generator() % 5) values[i] = special[generator() % special.size()];
  return values;
}

template <typename E>
bool SameBits(const std::vector<E>& a, const std::vector<E>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0);
}

template <typename T>
bool SameNumbers(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = Widen(a[i]) != Widen(a[i]) && Widen(b[i]) != Widen(b[i]);
    if (!both_nan && std::memcmp(&a[i], &b[i], sizeof(T)) != 0) return false;
  }
  return a.size() == b.size();
}

template <typename A>
bool IsNear(A a, A b, double epsilons) {
  if (a != a || b != b) return a != a && b != b;
  return a == b || std::abs(double(a) - double(b)) <= epsilons * std::numeric_limits<A>::epsilon() * std::abs(double(b));
}

const ParallelFor kInTurn = [](int64_t tasks, int64_t, const std::function<void(int64_t)>& body) {
  for (int64_t task = 0; task < tasks; ++task) body(task);
};

// ---------------------------------------------------------------------------------------------------------- forward

constexpr int64_t kAlways = 0, kNever = std::numeric_limits<int64_t>::max();

template <typename T, typename A>
struct Quantized {
  std::vector<T> quantized;
  std::vector<int32_t> index;
  std::vector<A> codebook_loss, commitment_loss;

  // The same bits; only of a loss that is NaN, the compiler may choose the bits.
  bool operator==(const Quantized& other) const {
    return SameBits(quantized, other.quantized) && SameBits(index, other.index) &&
           IsNear(codebook_loss[0], other.codebook_loss[0], 0) && IsNear(commitment_loss[0], other.commitment_loss[0], 0);
  }
};

template <typename T, typename A>
Quantized<T, A> RunForward(const std::vector<T>& x, const std::vector<A>& anchors, size_t shift, int64_t least_to_look_up) {
  const auto n = static_cast<int64_t>(x.size());
  const int count = static_cast<int>(anchors.size());
  const DeviceArray<T> device_x(x, shift);
  const DeviceArray<A> device_anchors(anchors, shift);
  const DeviceArray<T> quantized(x.size(), shift);
  const DeviceArray<int32_t> index(x.size(), shift);
  const DeviceArray<A> codebook_loss(1), commitment_loss(1);
  const DeviceArray<unsigned char> workspace(NearestAnchorCudaWorkspace<T, A>(n, count));
  const int error = Forward(device_x.get(), n, device_anchors.get(), count, quantized.get(), index.get(),
                            codebook_loss.get(), commitment_loss.get(), least_to_look_up, workspace.get(), nullptr);
  EXPECT(error == 0, "error %d", error);
  workspace.Read("workspace");
  EXPECT(SameBits(device_x.Read("x"), x) && SameBits(device_anchors.Read("anchors"), anchors), "an input was written");
  return {quantized.Read("quantized"), index.Read("index"), codebook_loss.Read("loss"), commitment_loss.Read("loss")};
}

template <typename A>
int32_t BruteForce(A x, const std::vector<A>& anchors) {
  if (x != x) return 0;
  int32_t best = 0;
  for (size_t k = 1; k < anchors.size(); ++k) {
    const bool better = std::isinf(x) ? (x > 0 ? anchors[k] > anchors[best] : anchors[k] < anchors[best])
                                      : std::abs(x - anchors[k]) < std::abs(x - anchors[best]);
    if (better) best = static_cast<int32_t>(k);
  }
  return best;
}

template <typename T, typename A>
void ForwardIsThatOfTheCpu(const char* name, const std::vector<T>& x, const std::vector<A>& anchors, size_t shift = 0,
                           bool repeated = true) {
  const auto n = static_cast<int64_t>(x.size());
  const int count = static_cast<int>(anchors.size());
  SetOrder(false, 5);
  const Quantized<T, A> result = RunForward(x, anchors, shift, kNever);

  Quantized<T, A> cpu = {x, std::vector<int32_t>(n), {0}, {0}};
  NearestAnchorCpu(x.data(), n, anchors.data(), count, cpu.quantized.data(), cpu.index.data(), cpu.codebook_loss.data(),
                   kInTurn);
  EXPECT(SameBits(result.index, cpu.index), "%s: n=%lld, Q=%d", name, (long long)n, count);
  EXPECT(SameBits(result.quantized, cpu.quantized), "%s: n=%lld, Q=%d", name, (long long)n, count);
  const A loss = result.codebook_loss[0];
  EXPECT(IsNear(loss, cpu.codebook_loss[0], sizeof(A) == 4 ? 1 : 100), "%s: n=%lld, Q=%d: %.17g and %.17g", name,
         (long long)n, count, double(loss), double(cpu.codebook_loss[0]));
  EXPECT(IsNear(loss, result.commitment_loss[0], 0), "%s", name);
  for (int64_t i = 0, step = 1 + n * count / 2000000; i < n; i += step) {
    const int32_t expected = BruteForce(A(Widen(x[i])), anchors);
    EXPECT(result.index[i] == expected, "%s: x[%lld]=%.17g: %d, not %d", name, (long long)i, double(Widen(x[i])),
           result.index[i], expected);
  }

  if (!repeated) return;
  // The same bits again, in another order, on another number of blocks, and by the other way to find an anchor.
  SetOrder(true, 2);
  EXPECT(RunForward(x, anchors, shift, kNever) == result, "%s: n=%lld, Q=%d, repeated", name, (long long)n, count);
  if (sizeof(T) == 2 && count <= kMostAnchorsToLookUp) {
    for (bool downwards : {false, true}) {
      SetOrder(downwards, 3);
      EXPECT(RunForward(x, anchors, shift, kAlways) == result, "%s: n=%lld, Q=%d, by look-up", name, (long long)n,
             count);
    }
  }
}

template <typename A>
std::vector<A> Grid(int count) {
  std::vector<A> anchors(count);
  for (int k = 0; k < count; ++k) anchors[k] = count == 1 ? A{0} : A(-3 + 6.0 * k / (count - 1));
  return anchors;
}

template <typename A>
struct Anchors {
  const char* name;
  std::vector<A> values;
};

template <typename A>
std::vector<Anchors<A>> DifficultAnchors() {
  std::vector<A> duplicates = RandomNumbers<A>(90);
  for (int k = 0; k < 30; ++k) duplicates[3 * k + 1] = duplicates[3 * (generator() % 30)];
  std::vector<A> wide(40);
  for (A& anchor : wide) anchor = A(std::copysign(std::pow(10.0, Uniform(-30, 30)), Uniform(-1, 1)));
  std::vector<A> clusters;
  for (int c = 0; c < 8; ++c) {
    for (int k = 0; k < 8; ++k) clusters.push_back(A(c - 4 + k * (c == 4 ? 1e-38 : 1e-7)));
  }
  std::vector<A> adjacent = {A(16777216)};
  for (int k = 0; k < 20; ++k) adjacent.push_back(std::nextafter(adjacent.back(), A(0)));
  constexpr A kMost = std::numeric_limits<A>::max();
  return {
      {"unsorted", RandomNumbers<A>(77)},
      {"duplicates", duplicates},
      {"all equal", std::vector<A>(9, A(0.5))},
      {"zeros", {A(0.0), A(-0.0), 1, A(-0.0), A(0.0), -1}},
      {"zeros, the negative first", {A(-0.0), A(0.0), 2, -2}},
      {"wide", wide},
      {"clusters", clusters},
      {"adjacent", adjacent},
      {"the whole range", {-kMost, kMost, 0, kMost / 2, -kMost / 3, 1}},
      {"descending", {5, 4, 3, 2, 1, 0, -1}},
  };
}

template <typename T, typename A>
void TestForward(const char* type) {
  for (int count : {1, 2, 7, 20, 64, 256, 257, 1000, 5000}) {
    const std::vector<A> anchors = count % 2 == 0 ? Grid<A>(count) : RandomNumbers<A>(count);
    ForwardIsThatOfTheCpu(type, As<T>(DifficultElements(count < 100 ? 3000 : 20000, anchors, count == 7)), anchors, count % 3);
  }
  for (size_t n : {0, 1, 3, 255, 256, 1000, 4095, 4097}) {
    ForwardIsThatOfTheCpu(type, As<T>(DifficultElements(n, Grid<A>(20), n == 3)), Grid<A>(20), n % 2);
  }
  for (const Anchors<A>& anchors : DifficultAnchors<A>()) {
    ForwardIsThatOfTheCpu(anchors.name, As<T>(DifficultElements(2500, anchors.values, false)), anchors.values);
  }
  // Long enough for blocks that have several chunks, and for an element to be reached by each of them.
  const std::vector<A> anchors = RandomNumbers<A>(100);
  ForwardIsThatOfTheCpu(type, As<T>(RandomNumbers<A>(200003)), anchors);
  // All there are, also each NaN.
  if (sizeof(T) == 2) {
    std::vector<T> all(65536);
    for (size_t bits = 0; bits < all.size(); ++bits) {
      const auto half = static_cast<uint16_t>(bits);
      std::memcpy(&all[bits], &half, sizeof(half));
    }
    ForwardIsThatOfTheCpu(type, all, anchors);
    ForwardIsThatOfTheCpu(type, all, RandomNumbers<A>(300));
  }
}

template <typename T, typename A>
void TestAnchorsThatAreNotFinite() {
  constexpr A kInfinity = std::numeric_limits<A>::infinity(), kNan = std::numeric_limits<A>::quiet_NaN();
  for (int count : {1, 3, 256, 600}) {
    for (A bad : {kNan, -kNan, kInfinity, -kInfinity}) {
      std::vector<A> anchors = RandomNumbers<A>(count);
      anchors[generator() % count] = bad;
      for (size_t n : {0, 700}) {
        SetOrder(count == 3, 5);
        const Quantized<T, A> result =
            RunForward(As<T>(DifficultElements(n, Grid<A>(9), true)), anchors, 0, bad > 0 ? kAlways : kNever);
        bool as_told = result.codebook_loss[0] != result.codebook_loss[0] &&
                       result.commitment_loss[0] != result.commitment_loss[0];
        for (size_t i = 0; i < n; ++i) {
          as_told = as_told && result.index[i] == 0 && Widen(result.quantized[i]) != Widen(result.quantized[i]);
        }
        EXPECT(as_told, "n=%zu, Q=%d, with %g", n, count, double(bad));
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------- gradient

template <typename T, typename A>
struct Gradients {
  std::vector<T> d_x;
  std::vector<A> d_anchors;
};

template <typename T, typename A>
Gradients<T, A> RunGradient(const std::vector<T>& x, const std::vector<A>& anchors, const std::vector<int32_t>& index,
                            const std::vector<T>& d_quantized, A d_codebook, A d_commitment, size_t shift,
                            bool in_place) {
  const auto n = static_cast<int64_t>(x.size());
  const int count = static_cast<int>(anchors.size());
  const DeviceArray<T> device_x(x, shift), device_d_quantized(d_quantized, shift), own_d_x(x.size(), shift);
  const DeviceArray<A> device_anchors(anchors, shift), d_anchors(anchors.size(), shift);
  const DeviceArray<int32_t> device_index(index, shift);
  const DeviceArray<A> device_d_codebook(std::vector<A>{d_codebook}), device_d_commitment(std::vector<A>{d_commitment});
  const DeviceArray<unsigned char> workspace(NearestAnchorGradCudaWorkspace<T, A>(n, count));
  const DeviceArray<T>& d_x = in_place ? device_d_quantized : own_d_x;
  const int error = NearestAnchorGradCuda(device_x.get(), n, device_anchors.get(), count, device_index.get(),
                                          device_d_quantized.get(), device_d_codebook.get(), device_d_commitment.get(),
                                          d_x.get(), d_anchors.get(), workspace.get(), nullptr);
  EXPECT(error == 0, "error %d", error);
  workspace.Read("workspace");
  EXPECT(SameBits(device_x.Read("x"), x) && SameBits(device_anchors.Read("anchors"), anchors) &&
             SameBits(device_index.Read("index"), index) &&
             (in_place || SameBits(device_d_quantized.Read("d_quantized"), d_quantized)),
         "an input was written");
  return {d_x.Read("d_x"), d_anchors.Read("d_anchors")};
}

template <typename T, typename A>
void GradientIsRight(const char* name, const std::vector<T>& x, const std::vector<A>& anchors,
                     const std::vector<int32_t>& index, A d_codebook, A d_commitment, size_t shift = 0) {
  const auto n = static_cast<int64_t>(x.size());
  const int count = static_cast<int>(anchors.size());
  std::vector<A> increasing(n);
  for (int64_t i = 0; i < n; ++i) increasing[i] = A(i + 1) / A(n);
  const std::vector<T> d_quantized = As<T>(increasing);
  SetOrder(false, 5);
  const Gradients<T, A> result = RunGradient(x, anchors, index, d_quantized, d_codebook, d_commitment, shift, false);

  std::vector<T> cpu_d_x(n);
  std::vector<A> cpu_d_anchors(count);
  const int64_t bad = NearestAnchorGradCpu(x.data(), n, anchors.data(), count, index.data(), d_quantized.data(),
                                           d_codebook, d_commitment, cpu_d_x.data(), cpu_d_anchors.data(), kInTurn);
  EXPECT(bad < 0, "%s: index[%lld]", name, (long long)bad);
  EXPECT(SameNumbers(result.d_x, cpu_d_x), "%s: n=%lld, Q=%d", name, (long long)n, count);

  if (n == 0 || d_codebook == 0) {
    EXPECT(SameBits(result.d_anchors, std::vector<A>(count)), "%s: n=%lld, Q=%d", name, (long long)n, count);
  }
  std::vector<double> sum(count), magnitude(count);
  for (int64_t i = 0; i < n; ++i) {
    const double difference = double(A(anchors[index[i]] - A(Widen(x[i]))));
    sum[index[i]] += difference;
    magnitude[index[i]] += std::abs(difference);
  }
  for (int k = 0; k < count; ++k) {
    const double factor = n > 0 ? 2.0 / double(n) * double(d_codebook) : 0;
    const double expected = d_codebook == 0 ? 0 : factor * sum[k];
    const double allowed = 4 * std::numeric_limits<A>::epsilon() * std::abs(expected) +
                           1e-14 * std::abs(factor) * magnitude[k] + std::numeric_limits<A>::min();
    const bool both_nan = expected != expected && result.d_anchors[k] != result.d_anchors[k];
    EXPECT(both_nan || expected == double(result.d_anchors[k]) ||
               std::abs(double(result.d_anchors[k]) - expected) <= allowed,
           "%s: n=%lld, Q=%d: d_anchors[%d]=%.17g, not %.17g", name, (long long)n, count, k,
           double(result.d_anchors[k]), expected);
  }

  SetOrder(true, 2);
  const Gradients<T, A> again = RunGradient(x, anchors, index, d_quantized, d_codebook, d_commitment, shift, true);
  EXPECT(SameBits(again.d_x, result.d_x), "%s: n=%lld, Q=%d, in place", name, (long long)n, count);
  EXPECT(SameBits(again.d_anchors, result.d_anchors), "%s: n=%lld, Q=%d, in place", name, (long long)n, count);
}

template <typename T, typename A>
std::vector<int32_t> NearestIndices(const std::vector<T>& x, const std::vector<A>& anchors) {
  std::vector<T> quantized(x.size());
  std::vector<int32_t> index(x.size());
  A loss;
  NearestAnchorCpu(x.data(), static_cast<int64_t>(x.size()), anchors.data(), static_cast<int>(anchors.size()),
                   quantized.data(), index.data(), &loss, kInTurn);
  return index;
}

template <typename T, typename A>
void TestGradient(const char* type) {
  // Around each change of the number of columns and of ranges.
  for (int count : {1, 2, 7, 20, 64, 65, 256, 257, 1000, 2048, 2049, 5000}) {
    const std::vector<A> anchors = count % 2 == 0 ? Grid<A>(count) : RandomNumbers<A>(count);
    const std::vector<T> x = As<T>(RandomNumbers<A>(count < 100 ? 3001 : 20001));
    GradientIsRight(type, x, anchors, NearestIndices(x, anchors), A(0.7), A(-0.3), count % 3);
  }
  for (size_t n : {0, 1, 3, 255, 256, 1000, 2047, 2049}) {
    const std::vector<A> anchors = RandomNumbers<A>(20);
    const std::vector<T> x = As<T>(RandomNumbers<A>(n));
    GradientIsRight(type, x, anchors, NearestIndices(x, anchors), A(2), A(1), n % 2);
  }
  // One anchor takes nearly all, in rows that have one column.
  for (int count : {64, 256, 300}) {
    const std::vector<A> anchors = RandomNumbers<A>(count);
    std::vector<int32_t> index(6000, count - 1);
    for (size_t i = 0; i < index.size(); i += 97) index[i] = static_cast<int32_t>(generator() % count);
    GradientIsRight(type, As<T>(RandomNumbers<A>(index.size())), anchors, index, A(1), A(0.25));
  }
  const std::vector<A> anchors = RandomNumbers<A>(100);
  const std::vector<T> x = As<T>(RandomNumbers<A>(100003));
  GradientIsRight(type, x, anchors, NearestIndices(x, anchors), A(1), A(0.25));
  GradientIsRight(type, std::vector<T>(), anchors, {}, std::numeric_limits<A>::infinity(), A(1));
  // Sums that depend on the order: most of each is large and cancels.
  for (int count : {3, 70, 300, 2100}) {
    std::vector<A> pairs = RandomNumbers<A>(8000);
    std::vector<int32_t> index(pairs.size());
    for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
      index[i] = index[i + 1] = static_cast<int32_t>(generator() % 5 == 0 ? generator() % count : 1);
      if (i % 6 == 0) continue;
      pairs[i] = A(std::copysign(std::pow(2.0, Uniform(0, sizeof(T) == 2 ? 15 : 100)), Uniform(-1, 1)));
      pairs[i + 1] = -pairs[i];
    }
    for (size_t i = 0; i < pairs.size(); ++i) {
      const size_t j = i + generator() % (pairs.size() - i);
      std::swap(pairs[i], pairs[j]);
      std::swap(index[i], index[j]);
    }
    GradientIsRight(type, As<T>(pairs), Grid<A>(count), index, A(1), A(1));
  }
  // Infinities and NaNs reach where they belong, and nothing where an upstream gradient is 0.
  const std::vector<T> with_nan = As<T>(DifficultElements(3000, anchors, true));
  const std::vector<int32_t> index = NearestIndices(with_nan, anchors);
  for (A d_codebook : {A(0), A(-0.0), A(3)}) {
    for (A d_commitment : {A(0), A(-0.0), A(2), std::numeric_limits<A>::denorm_min()}) {
      GradientIsRight(type, with_nan, anchors, index, d_codebook, d_commitment);
    }
  }
}

template <typename T, typename A>
void TestBadIndices() {
  for (int count : {5, 200, 3000}) {
    const std::vector<A> anchors = RandomNumbers<A>(count);
    const std::vector<T> x = As<T>(RandomNumbers<A>(2500));
    const std::vector<T> d_quantized = As<T>(RandomNumbers<A>(x.size()));
    std::vector<int32_t> index(x.size()), bad(x.size());
    for (int32_t& k : index) k = static_cast<int32_t>(generator() % count);
    bad = index;
    const int32_t kBad[] = {-1, count, INT32_MAX, INT32_MIN, count + 1, -count};
    std::vector<bool> is_bad(x.size());
    for (size_t i = 0; i < x.size(); i += 1 + generator() % 7) {
      bad[i] = kBad[generator() % 6];
      is_bad[i] = true;
    }
    for (A d_commitment : {A(0), A(1)}) {
      const auto with = RunGradient(x, anchors, bad, d_quantized, A(1), d_commitment, 0, false);
      const auto without = RunGradient(x, anchors, index, d_quantized, A(1), d_commitment, 0, false);
      std::vector<double> sum(count);
      bool as_told = true;
      for (size_t i = 0; i < x.size(); ++i) {
        if (is_bad[i]) {
          as_told = as_told && Widen(with.d_x[i]) != Widen(with.d_x[i]);
        } else {
          as_told = as_told && std::memcmp(&with.d_x[i], &without.d_x[i], sizeof(T)) == 0;
          sum[index[i]] += double(A(anchors[index[i]] - A(Widen(x[i]))));
        }
      }
      for (int k = 0; k < count; ++k) {
        const double expected = 2.0 / double(x.size()) * sum[k];
        as_told = as_told && std::abs(double(with.d_anchors[k]) - expected) <= 1e-6 * std::abs(expected) + 1e-9;
      }
      EXPECT(as_told, "Q=%d, d_commitment=%g", count, double(d_commitment));
    }
    // Not read where both upstream gradients are 0.
    EXPECT(SameBits(RunGradient(x, anchors, bad, d_quantized, A(0), A(0), 0, false).d_x, d_quantized), "Q=%d", count);
  }
}

// ------------------------------------------------------------------------------------------------------------ sizes

void TestSizes() {
  for (int64_t n : {int64_t{1}, int64_t{100000000}, int64_t{1} << 31, (int64_t{1} << 31) + 5, int64_t{1} << 36}) {
    for (int count : {1, 20, 256, 3000, kMaxAnchors}) {
      for (const Chunks& chunks : {SplitForward<Half>(n), SplitForward<double>(n), SplitGradient<Half>(n, count),
                                   SplitGradient<float>(n, count)}) {
        EXPECT(chunks.size > 0 && chunks.count > 0 && chunks.count <= kMostForwardChunks &&
                   (chunks.count - 1) * chunks.size < n && chunks.count * chunks.size >= n,
               "n=%lld, Q=%d: %lld chunks of %d", (long long)n, count, (long long)chunks.count, chunks.size);
      }
      const size_t forward = NearestAnchorCudaWorkspace<BFloat16, float>(n, count);
      const size_t backward = NearestAnchorGradCudaWorkspace<float, float>(n, count);
      EXPECT(forward <= 200000 + 40u * count, "n=%lld, Q=%d: %zu bytes", (long long)n, count, forward);
      EXPECT(backward <= size_t{32} << 20, "n=%lld, Q=%d: %zu bytes", (long long)n, count, backward);
    }
  }
}

#if defined(__CUDACC__)
// Positions that 32 bits cannot hold; only a device is fast enough for so many.
void TestMoreThan2To31Elements() {
  constexpr int64_t n = (int64_t{1} << 31) + 5;
  const std::vector<float> anchors = {2, 0, 1};
  const std::vector<BFloat16> last = As<BFloat16>(std::vector<float>{1, 0, 2.25f, 1, 2.25f});
  const size_t workspace_bytes =
      std::max(NearestAnchorCudaWorkspace<BFloat16, float>(n, 3), NearestAnchorGradCudaWorkspace<BFloat16, float>(n, 3));
  size_t available, total;
  Check(cudaMemGetInfo(&available, &total));
  if (available < 9 * static_cast<size_t>(n)) {
    std::printf("not tested for want of memory on the device: more than 2^31 elements\n");
    return;
  }
  unsigned char* const x = Allocate(n * sizeof(BFloat16));
  unsigned char* const quantized = Allocate(n * sizeof(BFloat16));
  unsigned char* const index = Allocate(n * sizeof(int32_t));
  Check(cudaMemset(x, 0, n * sizeof(BFloat16)));
  CopyToDevice(x + (n - 5) * sizeof(BFloat16), last.data(), 5 * sizeof(BFloat16));
  const DeviceArray<float> device_anchors(anchors), losses(2), one(std::vector<float>{1}), d_anchors(3);
  const DeviceArray<unsigned char> workspace(workspace_bytes);
  const auto* elements = reinterpret_cast<const BFloat16*>(x);
  auto* const results = reinterpret_cast<BFloat16*>(quantized);
  auto* const indices = reinterpret_cast<int32_t*>(index);

  int error = NearestAnchorCuda(elements, n, device_anchors.get(), 3, results, indices, losses.get(), losses.get() + 1,
                                workspace.get(), nullptr);
  EXPECT(error == 0, "error %d", error);
  std::vector<int32_t> last_index(6);
  CopyToHost(last_index.data(), indices + n - 6, 6 * sizeof(int32_t));
  EXPECT(last_index == (std::vector<int32_t>{1, 2, 1, 0, 2, 0}), "the last index is %d", last_index[5]);
  const float loss = losses.Read("losses")[1];
  EXPECT(IsNear(loss, static_cast<float>(2 * 0.0625 / n), 1), "%g", loss);

  // In place of the quantized elements, and with them as upstream gradient.
  error = NearestAnchorGradCuda(elements, n, device_anchors.get(), 3, indices, results, one.get(), one.get(), results,
                                d_anchors.get(), workspace.get(), nullptr);
  EXPECT(error == 0, "error %d", error);
  std::vector<BFloat16> last_d_x(5);
  CopyToHost(last_d_x.data(), results + n - 5, 5 * sizeof(BFloat16));
  EXPECT(SameBits(last_d_x, As<BFloat16>(std::vector<float>{1, 0, 2, 1, 2})), "the last d_x is %g", Widen(last_d_x[4]));
  const std::vector<float> expected = {static_cast<float>(-2.0 / n * 0.5), 0, 0};
  EXPECT(IsNear(d_anchors.Read("d_anchors")[0], expected[0], 1), "%g", d_anchors.Read("d_anchors")[0]);
  for (unsigned char* memory : {x, quantized, index}) Release(memory);
}
#endif

template <typename T, typename A>
void TestType(const char* type) {
  TestForward<T, A>(type);
  TestAnchorsThatAreNotFinite<T, A>();
  TestGradient<T, A>(type);
  TestBadIndices<T, A>();
}

// Each kernel, in small, for ThreadSanitizer: it remembers who read and wrote what, which takes its time, and reports
// what no barrier orders.
template <typename T, typename A>
void TestOrderOfThreads() {
  SetOrder(false, 1);
  for (int count : {1, 20, 300, 1100}) {
    const std::vector<A> anchors = RandomNumbers<A>(count);
    const std::vector<T> x = As<T>(DifficultElements(9001, anchors, true));
    RunForward(x, anchors, 0, kNever);
    if (count == 20) RunForward(x, anchors, 0, kAlways);
  }
  for (int count : {20, 100, 300, 2100}) {
    const std::vector<A> anchors = RandomNumbers<A>(count);
    const std::vector<T> x = As<T>(RandomNumbers<A>(1500));
    std::vector<int32_t> index(x.size(), 1);
    for (size_t i = 0; i < index.size(); i += 1 + i % 3) index[i] = static_cast<int32_t>(generator() % count);
    RunGradient(x, anchors, index, x, A(1), A(1), 0, true);
  }
}

}  // namespace
}  // namespace aib_tf

int main() {
  using namespace aib_tf;
#if defined(__SANITIZE_THREAD__)
  TestOrderOfThreads<BFloat16, float>();
  TestOrderOfThreads<double, double>();
  return failures == 0 ? 0 : 1;
#endif
  TestSizes();
  TestType<float, float>("float");
  TestType<BFloat16, float>("bfloat16");
  TestType<Half, float>("half");
  TestType<double, double>("double");
  // The most anchors there can be, once: ranking them takes the emulation seconds.
  ForwardIsThatOfTheCpu("float", RandomNumbers<float>(3000), RandomNumbers<float>(kMaxAnchors), 0, /*repeated=*/false);
#if defined(__CUDACC__)
  TestMoreThan2To31Elements();
#endif
  std::printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
