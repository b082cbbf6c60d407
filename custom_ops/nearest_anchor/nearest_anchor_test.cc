// Tests of nearest_anchor.h and the CPU kernels against a search that tries every anchor. It prints what fails and
// exits with 1. AIB_TF_CPU chooses the instruction set; `--large` adds an array of more than 2^31 elements (17 GB).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "nearest_anchor.h"
#include "nearest_anchor_arguments.h"
#include "nearest_anchor_kernel.h"

namespace aib_tf {
namespace {

int checks = 0, failures = 0;

#define EXPECT(condition, ...)                                                       \
  do {                                                                               \
    ++checks;                                                                        \
    if (!(condition) && ++failures <= 20) {                                          \
      std::printf("%s:%d: %s is false. ", __FILE__, __LINE__, #condition);           \
      std::printf(__VA_ARGS__);                                                      \
      std::printf("\n");                                                             \
    }                                                                                \
  } while (false)

ParallelFor Threads(int threads) {
  return [threads](int64_t tasks, int64_t, const std::function<void(int64_t)>& body) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&] {
        for (int64_t task; (task = next++) < tasks;) body(task);
      });
    }
    for (std::thread& thread : pool) thread.join();
  };
}

template <typename T>
using Arithmetic = std::conditional_t<std::is_same<T, double>::value, double, float>;

template <typename T, typename A>
T Rounded(A x) {
  T to;
  Narrow(x, &to);
  return to;
}

template <typename T>
bool SameBits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename A>
int32_t ByTryingAll(A x, const std::vector<A>& anchors) {
  if (std::isnan(x)) return 0;
  if (std::isinf(x)) {
    const auto extreme = x > 0 ? std::max_element(anchors.begin(), anchors.end())
                               : std::min_element(anchors.begin(), anchors.end());
    return static_cast<int32_t>(extreme - anchors.begin());
  }
  int32_t best = 0;
  for (size_t k = 1; k < anchors.size(); ++k) {
    if (std::abs(x - anchors[k]) < std::abs(x - anchors[best])) best = static_cast<int32_t>(k);
  }
  return best;
}

template <typename T>
struct Result {
  std::vector<T> quantized;
  std::vector<int32_t> index;
  Arithmetic<T> loss;
};

template <typename T>
Result<T> Quantize(const std::vector<T>& x, const std::vector<Arithmetic<T>>& anchors, int threads = 1) {
  Result<T> result{std::vector<T>(x.size()), std::vector<int32_t>(x.size()), 0};
  NearestAnchorCpu<T, Arithmetic<T>>(x.data(), x.size(), anchors.data(), anchors.size(), result.quantized.data(),
                                     result.index.data(), &result.loss, Threads(threads));
  return result;
}

template <typename A>
std::vector<std::vector<A>> InterestingAnchors() {
  std::mt19937 random(0);
  std::vector<std::vector<A>> sets = {
      {A(0.25)},
      {0, 1},
      {1, -1},
      {-1, 1},
      {A(0.7), -2, A(0.1), 3, A(0.5)},
      {A(0.5), A(0.25), A(0.5), 0, A(0.25), A(0.25)},
      std::vector<A>(7, A(0.5)),
      {A(-1e30), A(1e30), 0, 1},
      {0, A(-0.0), 1},
      {A(-0.0), 0, -1},
      {std::numeric_limits<A>::max(), std::numeric_limits<A>::lowest(), 0},
      {std::numeric_limits<A>::max(), std::numeric_limits<A>::lowest()},
      // Distances that overflow are equal, to whichever anchor.
      {std::numeric_limits<A>::lowest() / 8 * 5, std::numeric_limits<A>::lowest() / 8 * 7},
      {std::numeric_limits<A>::max() / 8 * 7, std::numeric_limits<A>::max() / 8 * 5, std::numeric_limits<A>::max()},
      {std::numeric_limits<A>::denorm_min(), 0, 3 * std::numeric_limits<A>::denorm_min()},
      {A(1e-38), A(2e-38), A(5e-38), 1},
      {A(1e7), A(1e7) + 1, A(1e7) + 2, 0},
      {100, A(1e-6), 0, A(2e-6), A(-1e-6)},
  };
  for (int count : {2, 3, 8, 9, 16, 17, 20, 32, 33, 50, 64, 65, 100, 255, 256, 257, 1000}) {
    std::vector<A> even(count), scattered(count), coarse(count), skewed(count);
    std::normal_distribution<double> normal(0.5, 1);
    for (int k = 0; k < count; ++k) {
      even[k] = static_cast<A>(k / std::max(1.0, count - 1.0));
      scattered[k] = static_cast<A>(normal(random));
      coarse[k] = static_cast<A>(std::round(4 * normal(random)) / 4);
      skewed[k] = static_cast<A>(std::exp(12 * normal(random)) * (random() % 2 ? 1 : -1));
    }
    for (auto& set : {even, scattered, coarse, skewed}) sets.push_back(set);
  }
  return sets;
}

// At each anchor and each middle, a few numbers to either side, far beyond the ends, NaN and the infinities, and
// numbers of every size.
template <typename A>
std::vector<A> BoundaryValues(const std::vector<A>& anchors) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity(), kMost = std::numeric_limits<A>::max();
  std::vector<A> sorted(anchors), x;
  std::sort(sorted.begin(), sorted.end());
  for (size_t k = 0; k < sorted.size(); ++k) {
    std::vector<A> places = {sorted[k]};
    if (k > 0) places.push_back(sorted[k - 1] / 2 + sorted[k] / 2);
    for (A place : places) {
      A above = place, below = place;
      x.push_back(place);
      for (int step = 0; step < 3; ++step) {
        x.push_back(above = std::nextafter(above, kInfinity));
        x.push_back(below = std::nextafter(below, -kInfinity));
      }
    }
  }
  for (A end : {sorted.front(), sorted.back()}) {
    for (double factor = 1e-9; factor < 1e12; factor *= 7) {
      x.push_back(end + static_cast<A>(factor));
      x.push_back(end - static_cast<A>(factor));
    }
  }
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    const A size = std::ldexp(A(1), static_cast<int>(random() % 250) - 125);
    x.push_back((random() % 2 ? size : -size) * static_cast<A>(1 + random() % 1000 / 1000.0));
  }
  for (A special : {A(0), A(-0.0), kMost, -kMost, kInfinity, -kInfinity, std::numeric_limits<A>::quiet_NaN(),
                    std::numeric_limits<A>::denorm_min(), -std::numeric_limits<A>::denorm_min()}) {
    x.push_back(special);
  }
  std::shuffle(x.begin(), x.end(), random);
  return x;
}

template <typename T>
void TestEveryBoundaryValueGoesWhereTryingAllSays() {
  using A = Arithmetic<T>;
  for (const std::vector<A>& anchors : InterestingAnchors<A>()) {
    std::vector<T> x;
    for (A value : BoundaryValues(anchors)) x.push_back(Rounded<T>(value));
    const Result<T> result = Quantize(x, anchors);
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const A wide = Widen(x[i]);
      const int32_t expected = ByTryingAll(wide, anchors);
      EXPECT(result.index[i] == expected, "x = %.9g of %zu anchors: %d instead of %d", static_cast<double>(wide),
             anchors.size(), result.index[i], expected);
      if (std::isnan(wide)) {
        EXPECT(std::isnan(Widen(result.quantized[i])), "NaN was lost");
      } else {
        EXPECT(SameBits(result.quantized[i], Rounded<T>(anchors[expected])), "x = %.9g of %zu anchors",
               static_cast<double>(wide), anchors.size());
      }
      const A difference = wide - anchors[expected];
      sum += static_cast<double>(difference * difference);
    }
    EXPECT(std::isnan(sum) && std::isnan(result.loss), "NaN in x has to show in the loss");
  }
}

template <typename T>
void TestEverySizeIsReadAndWrittenWithinItsBounds() {
  using A = Arithmetic<T>;
  const std::vector<A> few = {A(0.9), A(0.1), A(0.5)};
  std::vector<A> many(100);
  for (int k = 0; k < 100; ++k) many[k] = static_cast<A>(k / 100.0);
  for (const std::vector<A>& anchors : {few, many}) {
    for (int64_t n : {0, 1, 7, 8, 9, 15, 16, 17, 31, 1023, 1024, 1025, 16384, 16385, 40000}) {
      // Arrays of exactly this size, so that AddressSanitizer sees a step beyond.
      std::vector<T> x(n);
      std::mt19937 random(2);
      for (T& value : x) value = Rounded<T>(static_cast<A>(random() / 4294967296.0));
      const Result<T> result = Quantize(x, anchors);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        EXPECT(result.index[i] == ByTryingAll<A>(Widen(x[i]), anchors), "n = %ld, i = %ld", long(n), long(i));
        const A difference = Widen(x[i]) - anchors[result.index[i]];
        sum += static_cast<double>(difference * difference);
      }
      const double mean = n == 0 ? 0 : sum / static_cast<double>(n);
      EXPECT(std::abs(result.loss - mean) <= 1e-6 * mean, "n = %ld: %g instead of %g", long(n),
             static_cast<double>(result.loss), mean);
    }
  }
}

template <typename T>
void TestGradientIsThatOfTheFormula() {
  using A = Arithmetic<T>;
  for (int count : {1, 7, 20, 1024, 1025, 3000}) {
    for (int64_t n : {0, 1, 5, 1000, 100000}) {
      std::mt19937 random(3);
      std::normal_distribution<double> normal(0, 1);
      std::vector<A> anchors(count), d_anchors(count, A(123));
      for (A& anchor : anchors) anchor = static_cast<A>(normal(random));
      std::vector<T> x(n), d_quantized(n), d_x(n);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = Rounded<T>(static_cast<A>(normal(random)));
        d_quantized[i] = Rounded<T>(static_cast<A>(i % 1000));  // a misrouted element shows
      }
      const Result<T> forward = Quantize(x, anchors);
      for (A d_codebook : {A(3), A(0)}) {
        for (A d_commitment : {A(5000), A(0)}) {
          const int64_t bad = NearestAnchorGradCpu<T, A>(x.data(), n, anchors.data(), count, forward.index.data(),
                                                         d_quantized.data(), d_codebook, d_commitment, d_x.data(),
                                                         d_anchors.data(), Threads(2));
          EXPECT(bad == -1, "n = %ld", long(n));
          std::vector<double> sums(count);
          for (int64_t i = 0; i < n; ++i) {
            const double difference = static_cast<double>(Widen(x[i])) - anchors[forward.index[i]];
            sums[forward.index[i]] -= difference;
            const double expected = Widen(d_quantized[i]) + d_commitment * 2 * difference / n;
            const double rounding = sizeof(T) == 2 ? 0.005 : 1e-5;
            EXPECT(std::abs(Widen(d_x[i]) - expected) <= rounding * (1 + std::abs(expected)), "%g instead of %g",
                   static_cast<double>(Widen(d_x[i])), expected);
          }
          for (int k = 0; k < count; ++k) {
            const double expected = n == 0 ? 0 : d_codebook * 2 / n * sums[k];
            EXPECT(std::abs(d_anchors[k] - expected) <= 1e-5 * (1e-3 + std::abs(expected)), "%g instead of %g",
                   static_cast<double>(d_anchors[k]), expected);
          }
        }
      }
    }
  }
}

void TestUnusedLossesAddNothingAtInfinityAndNaN() {
  const float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {0.1f, kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
  const std::vector<float> anchors = {0, 1}, d_quantized = {1, 2, 3, 4};
  const Result<float> forward = Quantize(x, anchors);
  std::vector<float> d_x(4), d_anchors(2);
  NearestAnchorGradCpu<float, float>(x.data(), 4, anchors.data(), 2, forward.index.data(), d_quantized.data(), 0, 0,
                                     d_x.data(), d_anchors.data(), Threads(1));
  EXPECT(d_x == d_quantized && d_anchors == std::vector<float>(2), "no loss is used");
  NearestAnchorGradCpu<float, float>(x.data(), 4, anchors.data(), 2, forward.index.data(), d_quantized.data(), 1, 0,
                                     d_x.data(), d_anchors.data(), Threads(1));
  EXPECT(d_x == d_quantized && std::isnan(d_anchors[0]) && d_anchors[1] == -kInfinity, "only the codebook loss is");
  NearestAnchorGradCpu<float, float>(x.data(), 4, anchors.data(), 2, forward.index.data(), d_quantized.data(), 0, 1,
                                     d_x.data(), d_anchors.data(), Threads(1));
  EXPECT(d_anchors == std::vector<float>(2) && d_x[1] == kInfinity && std::isnan(d_x[3]), "only the commitment is");
}

void TestGradientsThatUnderflowOrOverflowOnTheWayDoNotShow() {
  const std::vector<float> d_quantized(100, 1.f), anchors = {0, 1};
  std::vector<float> d_x(100), d_anchors(2);
  std::vector<float> x(100, std::numeric_limits<float>::quiet_NaN());
  std::vector<int32_t> index(100, 0);
  NearestAnchorGradCpu<float, float>(x.data(), 100, anchors.data(), 2, index.data(), d_quantized.data(), 0, 1e-45f,
                                     d_x.data(), d_anchors.data(), Threads(1));
  EXPECT(std::isnan(d_x[0]), "the commitment loss is used, however little");
  x.assign(100, 3e38f);
  NearestAnchorGradCpu<float, float>(x.data(), 100, anchors.data(), 2, index.data(), d_quantized.data(), 1e-3f, 0,
                                     d_x.data(), d_anchors.data(), Threads(1));
  EXPECT(std::abs(d_anchors[0] + 6e35f) < 1e30f, "%g", static_cast<double>(d_anchors[0]));
}

void TestGradientMayOverwriteItsInputAndNamesABadIndex() {
  const int64_t n = 50000;
  std::vector<float> x(n), d(n), d_x(n), anchors = {0, 1}, d_anchors(2);
  for (int64_t i = 0; i < n; ++i) x[i] = d[i] = static_cast<float>(i % 17) / 8;
  std::vector<int32_t> index = Quantize(x, anchors).index;
  const auto gradient = [&](const float* from, float* to) {
    return NearestAnchorGradCpu<float, float>(x.data(), n, anchors.data(), 2, index.data(), from, 1, 2, to,
                                              d_anchors.data(), Threads(2));
  };
  gradient(d.data(), d_x.data());
  EXPECT(d != d_x, "the commitment loss moves x");
  gradient(d.data(), d.data());
  EXPECT(d == d_x, "in place it is the same");
  for (int32_t bad : {-1, 2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    index[40000] = index[45000] = bad;
    EXPECT(gradient(d.data(), d_x.data()) == 40000, "index %d", bad);
  }
}

template <typename T>
void TestThreadsAndRepetitionDoNotShow() {
  using A = Arithmetic<T>;
  std::mt19937 random(5);
  std::vector<T> x(200000), d_x(x.size()), first_d_x;
  for (T& value : x) value = Rounded<T>(static_cast<A>(random() / 4294967296.0));
  std::vector<A> anchors(50), d_anchors(50), first_d_anchors;
  for (A& anchor : anchors) anchor = static_cast<A>(random() / 4294967296.0);
  const Result<T> first = Quantize(x, anchors);
  for (int repeat = 0; repeat < 20; ++repeat) {
    const int threads = 1 << repeat % 3;
    const Result<T> again = Quantize(x, anchors, threads);
    EXPECT(again.index == first.index && SameBits(again.loss, first.loss), "%d threads", threads);
    EXPECT(std::memcmp(again.quantized.data(), first.quantized.data(), x.size() * sizeof(T)) == 0, "%d threads",
           threads);
    NearestAnchorGradCpu<T, A>(x.data(), x.size(), anchors.data(), 50, first.index.data(), x.data(), 3, 5, d_x.data(),
                               d_anchors.data(), Threads(threads));
    if (repeat == 0) first_d_x = d_x, first_d_anchors = d_anchors;
    EXPECT(std::memcmp(d_x.data(), first_d_x.data(), x.size() * sizeof(T)) == 0, "%d threads", threads);
    EXPECT(d_anchors == first_d_anchors, "%d threads", threads);
  }
}

void TestHalfTypesRoundToNearestAndBack() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const float wide = Widen(half);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
      EXPECT(fraction ? std::isnan(wide) : std::isinf(wide), "half %x", bits);
      EXPECT(fraction ? std::isnan(Widen(Rounded<Half>(wide))) : SameBits(Rounded<Half>(wide), half), "half %x", bits);
      continue;
    }
    const float magnitude = std::ldexp(exponent ? 1024.f + fraction : float(fraction), std::max(exponent, 1) - 25);
    EXPECT(SameBits(wide, bits & 0x8000 ? -magnitude : magnitude), "half %x", bits);
    EXPECT(SameBits(Rounded<Half>(wide), half), "half %x", bits);
    if ((bits & 0x7fff) == 0x7bff) continue;
    // Halfway to the next, the even one of the two wins; a step to either side decides.
    const float next = Widen(Half{static_cast<uint16_t>(bits + 1)}), middle = wide / 2 + next / 2;
    EXPECT(Rounded<Half>(middle).bits == bits + (bits & 1), "half %x", bits);
    EXPECT(Rounded<Half>(std::nextafter(middle, wide)).bits == bits, "half %x", bits);
    EXPECT(Rounded<Half>(std::nextafter(middle, next)).bits == bits + 1, "half %x", bits);
  }
  EXPECT(Rounded<Half>(65519.99f).bits == 0x7bff && Rounded<Half>(65520.f).bits == 0x7c00, "the largest half");
  EXPECT(std::isinf(Widen(Rounded<Half>(1e9f))), "above all halves");
  EXPECT(Rounded<BFloat16>(1.00390625f).bits == 0x3f80 && Rounded<BFloat16>(1.01171875f).bits == 0x3f82, "to even");
  EXPECT(std::isnan(Widen(Rounded<BFloat16>(std::nanf("")))), "NaN stays");
  EXPECT(std::isinf(Widen(Rounded<BFloat16>(3.4e38f))), "above all bfloat16");
}

void TestProblemsAreNamed() {
  EXPECT(ProblemOfAnchorShape({3}).empty() && ProblemOfAnchorShape({-1}).empty(), "a vector is right");
  EXPECT(ProblemOfAnchorShape({}).find("shape=()") != std::string::npos, "a scalar");
  EXPECT(ProblemOfAnchorShape({1, -1}).find("shape=(1, ?)") != std::string::npos, "a matrix");
  EXPECT(ProblemOfAnchorShape({0}).find("shape=(0,)") != std::string::npos, "empty");
  EXPECT(ProblemOfAnchorShape({65537}).find("shape=(65537,)") != std::string::npos, "too many");
  EXPECT(ProblemOfTypes("float16", "float32").empty() && ProblemOfTypes("float64", "float64").empty(), "right");
  EXPECT(ProblemOfTypes("int32", "float32").find("x.dtype=int32") != std::string::npos, "integers");
  EXPECT(ProblemOfTypes("float64", "float32").find("anchors.dtype=float32") != std::string::npos, "no match");
  const float bad[] = {1, 2, -std::numeric_limits<float>::infinity()};
  EXPECT(ProblemOfAnchorValues(bad, 2).empty(), "finite");
  EXPECT(ProblemOfAnchorValues(bad, 3).find("anchors[2]=-inf") != std::string::npos, "infinite");
}

// Positions and counts beyond 2^31: a marked element in every 2^28, and the last one.
void TestMoreThanTwoToThe31Elements() {
  const int64_t n = (int64_t{1} << 31) + 12345;
  const std::vector<float> anchors = {0, 1};
  std::vector<BFloat16> x(n, Rounded<BFloat16>(0.25f)), quantized(n);
  std::vector<int32_t> index(n);
  std::vector<int64_t> marked = {n - 1};
  for (int64_t i = 0; i < n; i += int64_t{1} << 28) marked.push_back(i);
  for (int64_t i : marked) x[i] = Rounded<BFloat16>(0.75f);
  float loss;
  NearestAnchorCpu<BFloat16, float>(x.data(), n, anchors.data(), 2, quantized.data(), index.data(), &loss, Threads(2));
  EXPECT(loss == 0.0625f, "%g", static_cast<double>(loss));
  EXPECT(std::count(index.begin(), index.end(), 1) == static_cast<int64_t>(marked.size()), "marked elements");
  for (int64_t i : marked) EXPECT(index[i] == 1 && Widen(quantized[i]) == 1, "element %ld", long(i));
  std::vector<float> d_anchors(2);
  const int64_t bad = NearestAnchorGradCpu<BFloat16, float>(x.data(), n, anchors.data(), 2, index.data(), x.data(), 1,
                                                            0, x.data(), d_anchors.data(), Threads(2));
  EXPECT(bad == -1 && std::abs(d_anchors[0] + 0.5f) < 1e-6f, "%g", static_cast<double>(d_anchors[0]));
  index[n - 1] = 2;
  EXPECT((NearestAnchorGradCpu<BFloat16, float>(x.data(), n, anchors.data(), 2, index.data(), x.data(), 1, 0, x.data(),
                                                d_anchors.data(), Threads(2))) == n - 1,
         "the last index is bad");
}

template <typename T>
void TestType() {
  TestEveryBoundaryValueGoesWhereTryingAllSays<T>();
  TestEverySizeIsReadAndWrittenWithinItsBounds<T>();
  TestGradientIsThatOfTheFormula<T>();
  TestThreadsAndRepetitionDoNotShow<T>();
}

}  // namespace
}  // namespace aib_tf

int main(int argc, char** argv) {
  using namespace aib_tf;
  TestType<float>();
  TestType<double>();
  TestType<Half>();
  TestType<BFloat16>();
  TestUnusedLossesAddNothingAtInfinityAndNaN();
  TestGradientsThatUnderflowOrOverflowOnTheWayDoNotShow();
  TestGradientMayOverwriteItsInputAndNamesABadIndex();
  TestHalfTypesRoundToNearestAndBack();
  TestProblemsAreNamed();
  if (argc > 1 && std::string(argv[1]) == "--large") TestMoreThanTwoToThe31Elements();
  std::printf("nearest_anchor_test: %d checks on %s, %d failed\n", checks, CpuInstructionSet(), failures);
  return failures == 0 ? 0 : 1;
}
