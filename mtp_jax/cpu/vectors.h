// Vectors of floats as wide as the processor has them, bfloat16 numbers, and functions of a row of numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mtp_jax {

// Registers: accumulators for MOST rows by VECTORS of a panel, or for FEW rows by COLUMNS of values, and what they meet.
#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 12, FEW = 6, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, MOST = 6, FEW = 3, COLUMNS = 4;
#elif defined(__SSE__)
constexpr int LANES = 4, MOST = 6, FEW = 3, COLUMNS = 4;
#else
constexpr int LANES = 4, MOST = 12, FEW = 6, COLUMNS = 4;
#endif
constexpr int VECTORS = 2, WIDTH = VECTORS * LANES;  // of a panel
constexpr int64_t AHEAD = 8192;  // bytes of a panel that are fetched before their turn
constexpr int64_t LINE = 64;     // bytes that memory gives at a time
constexpr int64_t UNITS = 4;     // that a product is cut into for each thread

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t Wholes __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* from) {
  Lanes v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Numbers of a, and behind them of b, by their places.
inline Lanes chosen(Lanes a, Lanes b, Wholes places) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a, b, places);
#else
  Lanes v;
  for (int i = 0; i < LANES; ++i) v[i] = places[i] < LANES ? a[places[i]] : b[places[i] - LANES];
  return v;
#endif
}

// Whole numbers. Compilers widen vectors of them one number at a time unless they are told the instruction.
inline Lanes load(const int8_t* from) {
#if defined(__AVX512F__)
  auto wide = (Wholes)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  auto wide = (Wholes)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Wholes wide;
  for (int i = 0; i < LANES; ++i) wide[i] = from[i];
#endif
  return __builtin_convertvector(wide, Lanes);
}

// The first `count` numbers, of which a vector takes as many as it has; a length that the compiler knows makes no call.
inline Lanes load(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Lanes v = {};
  __builtin_memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store(Lanes v, float* to, int64_t count) {
  if (count >= LANES)
    __builtin_memcpy(to, &v, sizeof v);
  else
    __builtin_memcpy(to, &v, count * sizeof(float));
}

// A bfloat16 is the upper half of a float.
struct Half {
  uint16_t bits;
  operator float() const {
    uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float number;
    __builtin_memcpy(&number, &whole, sizeof number);
    return number;
  }
};

inline Lanes load(const Half* from) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
  typedef uint32_t Wide __attribute__((vector_size(LANES * 4)));
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return (Lanes)(__builtin_convertvector(v, Wide) << 16);
}

// The numbers of a vector, joined by halves.
template <int n, typename Number, typename Join>
inline Number fold(const Number* v, Join join) {
  if constexpr (n == 2) {
    return join(v[0], v[1]);
  } else {
    typedef Number Part __attribute__((vector_size(n / 2 * sizeof(Number))));
    Part low, high;
    __builtin_memcpy(&low, v, sizeof low);
    __builtin_memcpy(&high, v + n / 2, sizeof high);
    low = join(low, high);
    Number out[n / 2];
    __builtin_memcpy(out, &low, sizeof low);
    return fold<n / 2>(out, join);
  }
}

template <int n>
inline float sum(const float* v) {
  return fold<n>(v, [](auto a, auto b) { return a + b; });
}

// a b + c, rounded once if the processor can: compilers may or may not fuse the two by themselves, as they see fit.
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_fmadd_ps(0xFFFF, (__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A row as whole numbers of 8 bits, each BLOCK of them with a scale of their own. `offset` is what the sum of a block's
// products has too much where the other factors are larger by 128. Behind the last number are zeros, to a multiple of 4.
constexpr int64_t BLOCK = 32;
struct Rounded {
  int8_t* numbers = nullptr;
  float* scales = nullptr;
  int32_t* offsets = nullptr;

  static int64_t width(int64_t K) { return (K + 3) / 4 * 4; }
  static int64_t blocks(int64_t K) { return (K + BLOCK - 1) / BLOCK; }
  Rounded row(int64_t r, int64_t K) const {
    return {numbers + r * width(K), scales + r * blocks(K), offsets + r * blocks(K)};
  }
};

#if defined(__AVX512VNNI__)
constexpr bool ROUNDS = true;
#else
constexpr bool ROUNDS = false;
#endif

inline void round_row(const float* x, int64_t K, Rounded to) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  constexpr int PARTS = BLOCK / LANES;
  const Lanes nearest = Lanes{} + 12582912.0f;  // 1.5 * 2^23: sums with it have no fraction
  for (int64_t k = 0; k < K; k += BLOCK, ++to.scales, ++to.offsets) {
    Lanes v[PARTS], most = {};
    for (int i = 0; i < PARTS; ++i) {
      v[i] = load(x + k + i * LANES, std::max<int64_t>(0, K - k - i * LANES));
      Lanes size = v[i] > 0 ? v[i] : -v[i];
      most = size > most ? size : most;
    }
    float top = fold<LANES>(reinterpret_cast<const float*>(&most), [](auto a, auto b) { return a > b ? a : b; });
    Lanes by = Lanes{} + (top > 0 ? 127 / top : 0);
    Wholes total = {};
    int8_t bytes[BLOCK];
    for (int i = 0; i < PARTS; ++i) {
      Wholes whole = __builtin_convertvector(multiply_add(v[i], by, nearest) - nearest, Wholes);
      Bytes narrow = __builtin_convertvector(whole, Bytes);
      total += whole;
      __builtin_memcpy(bytes + i * LANES, &narrow, sizeof narrow);
    }
    int32_t all = fold<LANES>(reinterpret_cast<const int32_t*>(&total), [](auto a, auto b) { return a + b; });
    *to.scales = top / 127, *to.offsets = -128 * all;
    std::copy_n(bytes, std::min(BLOCK, Rounded::width(K) - k), to.numbers + k);
  }
}

// e^x for x <= 0, to within two units in the last place; 0 below -87.
inline Lanes exponential(Lanes x) {
  Lanes low = x - x - 87.0f;
  Lanes clamped = x > low ? x : low;
  Wholes n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Wholes);  // nearest: the argument is never positive
  Lanes whole = __builtin_convertvector(n, Lanes);
  Lanes r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;
  Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;  // the polynomial of Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Lanes scale = (Lanes)((n + 127) << 23);
  return x > low ? p * scale : x - x;
}

inline Lanes silu(Lanes x) {
  Lanes e = exponential(x > 0 ? -x : x);
  return x * (x > 0 ? e - e + 1 : e) / (1 + e);
}

// x y, summed.
template <typename Number>
inline float dot(const float* x, const Number* y, int64_t D) {
  Lanes acc[2] = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES)
    for (int c = 0; c < 2; ++c) acc[c] += load(x + d + c * LANES) * load(y + d + c * LANES);
  for (; d < D; ++d) rest += x[d] * y[d];
  acc[0] += acc[1];
  return rest + sum<LANES>(reinterpret_cast<const float*>(&acc[0]));
}

// y = x / sqrt(mean(x^2) + epsilon) * scale
inline void norm(const float* x, int64_t D, const float* scale, float epsilon, float* y) {
  float by = 1 / std::sqrt(dot(x, x, D) / D + epsilon);
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] * by * scale[d];
}

}  // namespace mtp_jax
