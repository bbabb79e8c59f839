// What a decoding step spends its time on, for few rows on CPU, called from compiled XLA programs: all layers in one call,
// as what lies between two calls takes XLA longer than memory takes to give a small matrix; products with the weights of
// heads, and what chooses among their scores.
//
// y = x w is bound by reading w. It lies in panels of some columns, each from its first row to its last, so that it is
// read once and in the order of addresses: memory then gives twice of what it gives to several streams. Each number
// of a row of x meets a vector of a panel's row, and all rows of x meet it while it is in a register. Every sum runs over k
// in one order, so that a row's result does not depend on how many rows there are beside it.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Numbers = ffi::Span<const int64_t>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Heads = ffi::Buffer<ffi::F32, 4>;
using Ints = ffi::Buffer<ffi::S32, 1>;
using Ids = ffi::Buffer<ffi::S32, 2>;
using Bounds = ffi::Buffer<ffi::S32, 3>;
using Marks = ffi::Buffer<ffi::PRED, 4>;

namespace {

// Registers: accumulators for MOST rows by VECTORS of a panel, or for FEW rows by COLUMNS keys, and what they meet.
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

inline Lanes load(const float* from) {
  Lanes v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
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
  typedef uint32_t Wholes __attribute__((vector_size(LANES * 4)));
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return (Lanes)(__builtin_convertvector(v, Wholes) << 16);
}

template <int n>
inline float sum(const float* v) {
  typedef float Part __attribute__((vector_size(n * 2)));
  Part low, high;
  __builtin_memcpy(&low, v, sizeof low);
  __builtin_memcpy(&high, v + n / 2, sizeof high);
  low += high;
  float out[n / 2];
  __builtin_memcpy(out, &low, sizeof low);
  return sum<n / 2>(out);
}
template <>
inline float sum<2>(const float* v) {
  return v[0] + v[1];
}

// A row of a panel. One of halves has them in pairs, number i below number i + LANES: they part faster than neighbours.
inline void load_row(const float* from, Lanes (&v)[VECTORS]) {
  for (int c = 0; c < VECTORS; ++c) v[c] = load(from + c * LANES);
}

inline void load_row(const Half* from, Lanes (&v)[VECTORS]) {
  typedef uint32_t Pairs __attribute__((vector_size(LANES * 4)));
  Pairs pairs;
  __builtin_memcpy(&pairs, from, sizeof pairs);
  v[0] = (Lanes)(pairs << 16);
  v[1] = (Lanes)(pairs & 0xFFFF0000u);
}

// R rows of x, X apart, by a panel of K rows into `width` columns of y. Of the panel's rows every `every`-th, from number
// `fetch` on, lets what lies `ahead` of it be brought into cache, as long as it lies before `until`.
template <int R, bool ADD, typename Number>
void panel(const float* x, int64_t X, const Number* w, int64_t K, float* y, int64_t stride, int64_t width, int64_t ahead,
           const Number* until, int fetch, int every) {
  Lanes acc[R][VECTORS] = {};
  for (int64_t k = 0; k < K; ++k, w += WIDTH) {
    if (fetch-- == 0) {
      const Number* next = std::min(w + ahead, until);
      for (int64_t n = 0; n < WIDTH; n += LINE / sizeof(Number)) __builtin_prefetch(next + n);
      fetch = every - 1;
    }
    Lanes v[VECTORS];
    load_row(w, v);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < VECTORS; ++c) acc[r][c] += x[r * X + k] * v[c];
  }
  for (int r = 0; r < R; ++r) {
    float* out = y + r * stride;
    float total[WIDTH];
    __builtin_memcpy(total, acc[r], sizeof total);
    for (int64_t n = 0; n < width; n += LANES)
      store(ADD ? load(out + n, width - n) + load(total + n) : load(total + n), out + n, width - n);
  }
}

template <int R, bool ADD, typename... Rest>
void panel_by(int64_t rows, const float* x, int64_t X, Rest... rest) {
  if constexpr (R > 0) {
    if (rows == R) return panel<R, ADD>(x, X, rest...);
    panel_by<R - 1, ADD>(rows, x, X, rest...);
  }
}

// Rows of x, `stride` apart.
struct Input {
  const float* x = nullptr;
  int64_t rows = 0, stride = 0;
};

// A matrix of K rows in panels. It joins matrices that end at columns `ends`, each of which begins a panel of its own.
struct Panels {
  const void* w = nullptr;
  bool halves = false;  // bfloat16 numbers, not float
  int64_t K = 0, count = 0;
  Numbers ends;

  struct Place {
    int64_t column, width;
    size_t part;
  };

  Place place(int64_t p) const {
    int64_t begin = 0;
    for (size_t part = 0;; begin = ends[part++]) {
      int64_t panels = (ends[part] - begin + WIDTH - 1) / WIDTH;
      if (p < panels) return {begin + p * WIDTH, std::min<int64_t>(WIDTH, ends[part] - begin - p * WIDTH), part};
      p -= panels;
    }
  }

  // x by panel p into y, whose rows are N apart. Panels up to `last` are taken after it.
  template <bool ADD>
  void times(Input in, int64_t p, const Place& at, int64_t last, float* y, int64_t N) const {
    if (halves)
      times<ADD>(static_cast<const Half*>(w), in, p, at, last, y, N);
    else
      times<ADD>(static_cast<const float*>(w), in, p, at, last, y, N);
  }

  template <bool ADD, typename Number>
  void times(const Number* w, Input in, int64_t p, const Place& at, int64_t last, float* y, int64_t N) const {
    int64_t groups = (in.rows + MOST - 1) / MOST;
    // Rows in one go leave memory no time: what comes soon is fetched. Rows in several share the next panel's rows.
    int64_t ahead = groups == 1 ? AHEAD / sizeof(Number) : K * WIDTH;
    const Number *first = w + p * K * WIDTH, *until = w + last * K * WIDTH - WIDTH;
    for (int64_t g = 0, row = 0; g < groups; ++g) {
      int64_t rows = (in.rows - row + groups - g - 1) / (groups - g);
      panel_by<MOST, ADD>(rows, in.x + row * in.stride, in.stride, first, K, y + row * N + at.column, N, at.width, ahead,
                          until, static_cast<int>(g), static_cast<int>(groups));
      row += rows;
    }
  }
};

// A piece of work in units that any thread may take. Whoever comes takes what is left, in order; nobody waits for a
// thread that has not begun.
struct Work {
  std::atomic<int64_t> next{0}, finished{0};
  int64_t units = 0;

  virtual ~Work() = default;
  virtual void unit(int64_t u) = 0;
  void run() {
    for (int64_t u; (u = next.fetch_add(1)) < units;) {
      unit(u);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Matrices that one input meets: a bias, and the LoRA b (a x) of rows that meet it, are added.
struct Group {
  Panels w, a, b;
  const float* bias = nullptr;
  Numbers offsets;  // matrix i of w reads the columns of a x from offsets[i] on

  int64_t width() const { return w.ends[w.ends.size() - 1]; }
};

// What a group makes of x, or y plus that.
struct Products : Work {
  Input x;  // rows of all sequences
  Group group;
  float *y, *inner = nullptr;
  int64_t N, C = 0, sequences = 1, lora_rows = 0, together = 1, inner_units = 0;
  bool add = false;

  void prepare(int64_t threads) {
    const Panels &w = group.w, &a = group.a;
    N = group.width();
    together = std::clamp<int64_t>(w.count / (UNITS * threads), 1, 16);
    inner_units = lora_rows ? a.count : 0;
    units = inner_units + (w.count + together - 1) / together;
  }

  Input adapted(const Input& of, int64_t sequence) const {
    return {of.x + ((sequence + 1) * (of.rows / sequences) - lora_rows) * of.stride, lora_rows, of.stride};
  }

  void unit(int64_t u) override {
    const Panels &w = group.w, &a = group.a, &b = group.b;
    if (u < inner_units) {
      Panels::Place at = a.place(u);
      for (int64_t i = 0; i < sequences; ++i) a.times<false>(adapted(x, i), u, at, u + 1, inner + i * lora_rows * C, C);
      return;
    }
    int64_t first = (u - inner_units) * together, last = std::min(w.count, first + together);
    for (int64_t p = first; p < last; ++p) {
      Panels::Place at = w.place(p);
      if (add)
        w.times<true>(x, p, at, last, y, N);
      else
        w.times<false>(x, p, at, last, y, N);
      if (group.bias)
        for (int64_t row = 0; row < x.rows; ++row)
          for (int64_t n = at.column; n < at.column + at.width; ++n) y[row * N + n] += group.bias[n];
    }
    if (!lora_rows) return;
    while (finished.load(std::memory_order_acquire) < inner_units) pause();  // those units were taken before this one
    int64_t R = x.rows / sequences;
    for (int64_t p = first; p < last; ++p) {
      Panels::Place at = b.place(p);
      for (int64_t i = 0; i < sequences; ++i)
        b.times<true>({inner + i * lora_rows * C + group.offsets[at.part], lora_rows, C}, p, at, last,
                      y + ((i + 1) * R - lora_rows) * N, N);
    }
  }
};

// R rows of q, X apart, by C keys [., H], into y.
template <int R, int C>
void dots(const float* q, int64_t X, const float* keys, int64_t H, float* y, int64_t stride) {
  Lanes acc[R][C] = {};
  int64_t h = 0;
  for (; h + LANES <= H; h += LANES) {
    Lanes v[C];
    for (int c = 0; c < C; ++c) v[c] = load(keys + c * H + h);
    for (int r = 0; r < R; ++r) {
      Lanes u = load(q + r * X + h);
      for (int c = 0; c < C; ++c) acc[r][c] += u * v[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float rest = 0;
      for (int64_t i = h; i < H; ++i) rest += q[r * X + i] * keys[c * H + i];
      y[r * stride + c] = rest + sum<LANES>(reinterpret_cast<const float*>(&acc[r][c]));
    }
}

template <int R, int C>
void dots_by(int64_t rows, const float* q, int64_t X, const float* keys, int64_t H, float* y, int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return dots<R, C>(q, X, keys, H, y, stride);
    dots_by<R - 1, C>(rows, q, X, keys, H, y, stride);
  }
}

// All rows of q by `count` keys.
template <int C>
void scores_of(int64_t rows, const float* q, const float* keys, int64_t H, int64_t count, float* y, int64_t stride) {
  for (; count >= C; count -= C, keys += C * H, y += C)
    for (int64_t row = 0; row < rows; row += FEW)
      dots_by<FEW, C>(std::min<int64_t>(FEW, rows - row), q + row * H, H, keys, H, y + row * stride, stride);
  if (C > 1 && count) scores_of<1>(rows, q, keys, H, count, y, stride);
}

// e^x for x <= 0, to within two units in the last place; 0 below -87.
inline Lanes exponential(Lanes x) {
  typedef int32_t Whole __attribute__((vector_size(LANES * 4)));
  Lanes low = x - x - 87.0f;
  Lanes clamped = x > low ? x : low;
  Whole n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Whole);  // nearest: the argument is never positive
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

// Attention of a step's rows over the slots [low, high) of a cache and over those of the step's own keys that each sees.
// Queries and keys come as they were projected; they are normed, if there are scales, and rotated here. The first `real`
// rows' keys and values are written into the cache from slot `start` on; every slot that is seen lies before it.
struct Attention : Work {
  static constexpr int64_t TOGETHER = 48;  // rows whose scores exist at a time, on each thread
  const float *cosine, *sine, *q_scale = nullptr, *k_scale = nullptr;
  const int32_t *low, *high, *start;
  const bool* seen;
  float *projected, *keys, *values, *out, *own_keys, *own_values, epsilon;
  int64_t R, N, K, H, S, real;

  float* at(int64_t row, int64_t head) const { return projected + (row * (N + 2 * K) + head) * H; }

  // Head `head` of a row: normed, its pairs (h, h + H/2) rotated by the row's angles, times `by`.
  void rotate(int64_t row, int64_t head, const float* scale, float by, float* to) const {
    float* x = at(row, head);
    if (scale) norm(x, H, scale, epsilon, x);
    const float *c = cosine + row * H / 2, *s = sine + row * H / 2;
    for (int64_t h = 0; h < H / 2; ++h) {
      to[h] = (x[h] * c[h] - x[h + H / 2] * s[h]) * by;
      to[h + H / 2] = (x[h + H / 2] * c[h] + x[h] * s[h]) * by;
    }
  }

  void unit(int64_t u) override {  // one key/value head of one sequence
    int64_t sequence = u / K, head = u % K;
    for (int64_t r = 0; r < R; ++r) {
      rotate(sequence * R + r, N + head, k_scale, 1, own_keys + (u * R + r) * H);
      std::copy_n(at(sequence * R + r, N + K + head), H, own_values + (u * R + r) * H);
    }
    int64_t group = N / K;
    for (int64_t row = 0; row < group * R; row += TOGETHER) attend(u, row, std::min(TOGETHER, group * R - row));
    int64_t slot = u * S + std::clamp<int64_t>(start[sequence], 0, S - real);
    std::copy_n(own_keys + u * R * H, real * H, keys + slot * H);
    std::copy_n(own_values + u * R * H, real * H, values + slot * H);
  }

  // `rows` rows from number `first` on; row = r * group + which of the heads that share these keys.
  void attend(int64_t u, int64_t first, int64_t rows) const {
    int64_t sequence = u / K, head = u % K, group = N / K;
    const int32_t *from = low + sequence * R, *to = high + sequence * R;
    int64_t begin = S, end = 0;
    for (int64_t r = first / group; r <= (first + rows - 1) / group; ++r)
      if (from[r] < to[r]) begin = std::min<int64_t>(begin, from[r]), end = std::max<int64_t>(end, to[r]);
    begin = std::min(begin, end);
    int64_t held = end - begin, width = (held + R + LANES - 1) / LANES * LANES;
    thread_local std::vector<float> scaled, scores;
    scaled.resize(rows * H);
    scores.resize(rows * width);
    float root = 1 / std::sqrt(static_cast<float>(H));
    for (int64_t i = 0; i < rows; ++i) {
      int64_t row = first + i;
      rotate(sequence * R + row / group, head * group + row % group, q_scale, root, scaled.data() + i * H);
    }
    const float *k = keys + (u * S + begin) * H, *v = values + (u * S + begin) * H;
    scores_of<COLUMNS>(rows, scaled.data(), k, H, held, scores.data(), width);
    scores_of<COLUMNS>(rows, scaled.data(), own_keys + u * R * H, H, R, scores.data() + held, width);

    constexpr float NEVER = -3e38f;
    for (int64_t i = 0; i < rows; ++i) {
      float* score = scores.data() + i * width;
      int64_t r = (first + i) / group;
      std::fill(score, score + std::clamp<int64_t>(from[r] - begin, 0, held), NEVER);
      std::fill(score + std::clamp<int64_t>(to[r] - begin, 0, held), score + held, NEVER);
      for (int64_t o = 0; o < R; ++o)
        if (!seen[(sequence * R + r) * R + o]) score[held + o] = NEVER;
      std::fill(score + held + R, score + width, NEVER);
      Lanes most = load(score), total = {};
      for (int64_t s = LANES; s < width; s += LANES) {
        Lanes next = load(score + s);
        most = next > most ? next : most;
      }
      float tops[LANES];
      __builtin_memcpy(tops, &most, sizeof most);
      float top = *std::max_element(tops, tops + LANES);
      for (int64_t s = 0; s < width; s += LANES) {
        Lanes e = exponential(load(score + s) - top);
        total += e;
        __builtin_memcpy(score + s, &e, sizeof e);
      }
      float all = sum<LANES>(reinterpret_cast<const float*>(&total));
      for (int64_t s = 0; s < width; ++s) score[s] /= all;
    }
    const float* own = own_values + u * R * H;
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t h = 0; h < H; h += LANES) {
        int64_t row = first + i;
        float* result = out + (sequence * R * N + head * group) * H + h;
        const float* share = scores.data() + i * width;
        switch (std::min<int64_t>(4, rows - i)) {
          case 1: weigh<1>(row, h, held, width, share, v, own, result); break;
          case 2: weigh<2>(row, h, held, width, share, v, own, result); break;
          case 3: weigh<3>(row, h, held, width, share, v, own, result); break;
          case 4: weigh<4>(row, h, held, width, share, v, own, result); break;
        }
      }
  }

  // Numbers h, h + 1, ... of what W rows attend to, as many as a vector has or as are left.
  template <int W>
  void weigh(int64_t row, int64_t h, int64_t held, int64_t width, const float* share, const float* v, const float* own,
             float* result) const {
    Lanes acc[W] = {};
    for (int64_t s = 0; s < held + R; ++s) {
      Lanes value = load((s < held ? v + s * H : own + (s - held) * H) + h, H - h);
      for (int i = 0; i < W; ++i) acc[i] += share[i * width + s] * value;
    }
    int64_t group = N / K;
    for (int i = 0; i < W; ++i)
      store(acc[i], result + ((row + i) / group * N + (row + i) % group) * H, H - h);
  }
};

// y = norm(x), or silu(gate) * up for rows x of gate and up side by side.
struct ByRow : Work {
  static constexpr int64_t TOGETHER = 8;
  const float *x, *scale = nullptr;
  float *y, epsilon;
  int64_t rows, D;  // of y

  void unit(int64_t u) override {
    for (int64_t row = u * TOGETHER; row < std::min(rows, (u + 1) * TOGETHER); ++row)
      if (scale)
        norm(x + row * D, D, scale, epsilon, y + row * D);
      else
        gate(x + row * 2 * D, y + row * D);
  }

  void gate(const float* gates, float* to) const {
    for (int64_t d = 0; d < D; d += LANES)
      store(silu(load(gates + d, D - d)) * load(gates + D + d, D - d), to + d, D - d);
  }
};

// Rows of x by rows `ids` of a table.
template <typename Number>
struct Lookup : Work {
  static constexpr int64_t TOGETHER = 32;
  const float* x;
  const Number* table;
  const int32_t* ids;
  float* y;
  int64_t D, C;

  void unit(int64_t u) override {
    int64_t parts = (C + TOGETHER - 1) / TOGETHER, row = u / parts, first = u % parts * TOGETHER;
    int64_t last = std::min(C, first + TOGETHER);
    const int32_t* id = ids + row * C;
    for (int64_t c = first; c < std::min(last, first + 3); ++c) fetch(id[c]);
    for (int64_t c = first; c < last; ++c) {
      if (c + 3 < last) fetch(id[c + 3]);
      y[row * C + c] = dot(x + row * D, table + id[c] * D, D);
    }
  }
  void fetch(int64_t id) const {
    for (int64_t d = 0; d < D; d += LINE / sizeof(Number)) __builtin_prefetch(table + id * D + d);
  }
};

// The indices, in order, of the C largest numbers of each row of x; of equal ones the first. What is no number counts as
// the smallest.
struct Largest : Work {
  const float* x;
  int32_t* y;
  int64_t V, C;

  void unit(int64_t row) override {
    thread_local std::vector<float> tops, values;
    thread_local std::vector<int32_t> near;
    const float* numbers = x + row * V;
    // Number v is in class v modulo their count. At least C numbers are as large as the C-th of the classes' largest.
    int64_t classes = std::min(V, std::max<int64_t>(4 * C, 64));
    tops.assign(classes, LEAST);
    for (int64_t from = 0; from < V; from += classes)
      for (int64_t c = 0; c < std::min(classes, V - from); ++c)
        tops[c] = numbers[from + c] > tops[c] ? numbers[from + c] : tops[c];
    float bound = least(tops);
    near.resize(V);
    int64_t count = 0;
    for (int64_t v = 0; v < V; ++v) {
      near[count] = static_cast<int32_t>(v);
      count += !(numbers[v] < bound);
    }
    values.resize(count);
    for (int64_t i = 0; i < count; ++i) values[i] = std::max(LEAST, numbers[near[i]]);
    bound = least(values);
    int64_t equal = C - std::count_if(values.begin(), values.end(), [&](float value) { return value > bound; });
    int32_t* to = y + row * C;
    for (int64_t i = 0; i < count; ++i) {
      float value = std::max(LEAST, numbers[near[i]]);
      if (value > bound || (value == bound && equal-- > 0)) *to++ = near[i];
    }
  }

 private:
  static constexpr float LEAST = -std::numeric_limits<float>::infinity();

  // The C-th largest, which moves numbers about.
  float least(std::vector<float>& of) const {
    std::nth_element(of.begin(), of.begin() + (C - 1), of.end(), std::greater<float>());
    return of[C - 1];
  }
};

// Threads that help with a call. XLA's own pool lets its threads sleep within microseconds, and waking one takes as long
// as a product; these look out for the next call for some milliseconds before they sleep, and give way to whoever else
// wants their core.
class Team {
 public:
  explicit Team(int64_t helpers) {
    for (int64_t i = 0; i < helpers; ++i) std::thread([this] { help(); }).detach();
  }

  void run(std::shared_ptr<Work> work) {
    bool leading = work->units >= 4 && !busy_.exchange(true);
    if (leading) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        work_ = work;
        calls_.fetch_add(1, std::memory_order_release);
      }
      if (asleep_.load()) wake_.notify_all();
    }
    work->run();
    while (work->finished.load(std::memory_order_acquire) < work->units) pause();
    if (leading) busy_.store(false);
  }

 private:
  void help() {
    for (int64_t seen = 0;;) {
      auto begin = std::chrono::steady_clock::now();
      while (calls_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 32; ++i) pause();
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(3)) {
          std::unique_lock<std::mutex> lock(mutex_);
          asleep_.fetch_add(1);
          wake_.wait(lock, [&] { return calls_.load() != seen; });
          asleep_.fetch_sub(1);
        }
      }
      std::shared_ptr<Work> work;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = calls_.load();
        work = work_;
      }
      work->run();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Work> work_;
  std::atomic<int64_t> calls_{0};
  std::atomic<int> asleep_{0};
  std::atomic<bool> busy_{false};
};

void run(std::shared_ptr<Work> work, ffi::ThreadPool& pool) {
  static Team* team = new Team(pool.num_threads() - 1);  // never destroyed: its threads outlive main
  team->run(std::move(work));
}

bool halves(const ffi::AnyBuffer& numbers) { return numbers.element_type() == ffi::BF16; }

Panels panels_of(const ffi::AnyBuffer& w, Numbers ends) {
  return {w.untyped_data(), halves(w), w.dimensions()[1], w.dimensions()[0], ends};
}

ffi::Error Plain(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer w, ffi::Result<Matrix> y, Numbers ends) {
  auto work = std::make_shared<Products>();
  work->x = {x.typed_data(), x.dimensions()[0], x.dimensions()[1]};
  work->group.w = panels_of(w, ends);
  work->y = y->typed_data();
  work->prepare(pool.num_threads());
  run(work, pool);
  return ffi::Error::Success();
}

// Buffers of a call's layers, one after another.
struct Buffers {
  ffi::RemainingArgs& of;
  size_t next = 0;

  ffi::AnyBuffer any() { return *of.get<ffi::AnyBuffer>(next++); }
  const float* numbers() { return any().typed_data<float>(); }
};

// Row `id` of a table; its first or last where there is none, as XLA's gather has it.
void copy_row(const ffi::AnyBuffer& table, int64_t id, int64_t D, float* to) {
  id = std::clamp<int64_t>(id, 0, table.dimensions()[0] - 1);
  if (halves(table))
    for (int64_t d = 0; d < D; ++d) to[d] = static_cast<const Half*>(table.untyped_data())[id * D + d];
  else
    std::copy_n(table.typed_data<float>() + id * D, D, to);
}

// All layers and the final norm, over the rows of a step: of `tokens`, and behind them `masks`. `args` are for each layer
// its norms' scales; for each group its panels, bias, a and b; and the cache's keys and values, which `rets` alias.
ffi::Error Layers(ffi::ThreadPool pool, Ids tokens, ffi::AnyBuffer embedding, Matrix masks, Heads cosine, Heads sine,
                  Bounds low, Bounds high, Marks seen, Ints start, Vector final_scale, ffi::RemainingArgs args,
                  ffi::Result<Rows> y, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  auto numbers = [&](const char* name, size_t group) {
    return *attrs.get<Numbers>(name + std::to_string(group));
  };
  Numbers kinds = *attrs.get<Numbers>("kinds"), with_bias = *attrs.get<Numbers>("with_bias");
  float epsilon = *attrs.get<float>("epsilon");
  bool head_norms = *attrs.get<int64_t>("head_norms");
  int64_t B = y->dimensions()[0], R = y->dimensions()[1], D = y->dimensions()[2], rows = B * R;
  int64_t real = tokens.dimensions()[1];
  float* stream = y->typed_data();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t r = 0; r < real; ++r)
      copy_row(embedding, tokens.typed_data()[b * real + r], D, stream + (b * R + r) * D);
    std::copy_n(masks.typed_data(), (R - real) * D, stream + (b * R + real) * D);
  }

  thread_local std::vector<float> normed, projected, attended, gates, gated, inner, own_keys, own_values;
  auto by_row = [&](const float* from, const float* scale, int64_t width, float* to) {
    auto work = std::make_shared<ByRow>();
    work->x = from, work->scale = scale, work->y = to, work->epsilon = epsilon, work->rows = rows, work->D = width;
    work->units = (rows + ByRow::TOGETHER - 1) / ByRow::TOGETHER;
    run(work, pool);
  };
  auto project = [&](const float* from, int64_t width, const Group& group, float* to, bool add) {
    auto work = std::make_shared<Products>();
    work->x = {from, rows, width}, work->group = group, work->y = to, work->add = add, work->sequences = B;
    if (group.a.w && real < R) {
      work->lora_rows = R - real, work->C = group.a.ends[group.a.ends.size() - 1];
      inner.resize(B * work->lora_rows * work->C);
      work->inner = inner.data();
    }
    work->prepare(pool.num_threads());
    run(work, pool);
  };

  Buffers next{args};
  for (size_t layer = 0; layer < kinds.size(); ++layer) {
    const float *attention_scale = next.numbers(), *mlp_scale = next.numbers();
    const float* q_scale = head_norms ? next.numbers() : nullptr;
    const float* k_scale = head_norms ? next.numbers() : nullptr;
    Group groups[4];
    for (size_t i = 0; i < 4; ++i) {
      groups[i].w = panels_of(next.any(), numbers("ends", i));
      if (with_bias[i]) groups[i].bias = next.numbers();
      if (numbers("inner_ends", i).size()) {
        groups[i].a = panels_of(next.any(), numbers("inner_ends", i));
        groups[i].b = panels_of(next.any(), numbers("ends", i));
        groups[i].offsets = numbers("offsets", i);
      }
    }
    next.next += 2;  // the cache, read and written through what aliases it
    auto keys = **rets.get<ffi::AnyBuffer>(2 * layer), values = **rets.get<ffi::AnyBuffer>(2 * layer + 1);
    auto cache = keys.dimensions();
    int64_t K = cache[1], S = cache[2], H = cache[3], N = groups[0].width() / H - 2 * K, F = groups[2].width() / 2;
    normed.resize(rows * D), projected.resize(rows * (N + 2 * K) * H), attended.resize(rows * N * H);
    gates.resize(rows * 2 * F), gated.resize(rows * F);
    own_keys.resize(rows * K * H), own_values.resize(rows * K * H);

    by_row(stream, attention_scale, D, normed.data());
    project(normed.data(), D, groups[0], projected.data(), false);
    auto work = std::make_shared<Attention>();
    work->cosine = cosine.typed_data(), work->sine = sine.typed_data();
    work->q_scale = q_scale, work->k_scale = k_scale, work->epsilon = epsilon;
    work->low = low.typed_data() + kinds[layer] * rows, work->high = high.typed_data() + kinds[layer] * rows;
    work->seen = seen.typed_data() + kinds[layer] * rows * R, work->start = start.typed_data();
    work->projected = projected.data(), work->out = attended.data();
    work->keys = keys.typed_data<float>(), work->values = values.typed_data<float>();
    work->own_keys = own_keys.data(), work->own_values = own_values.data();
    work->R = R, work->N = N, work->K = K, work->H = H, work->S = S, work->real = real;
    work->units = B * K;
    run(work, pool);
    project(attended.data(), N * H, groups[1], stream, true);
    by_row(stream, mlp_scale, D, normed.data());
    project(normed.data(), D, groups[2], gates.data(), false);
    by_row(gates.data(), nullptr, F, gated.data());
    project(gated.data(), F, groups[3], stream, true);
  }
  by_row(stream, final_scale.typed_data(), D, stream);
  return ffi::Error::Success();
}

template <typename Number>
std::shared_ptr<Work> look_up(const float* x, const void* table, const int32_t* ids, int64_t rows, int64_t D, int64_t C,
                              float* y) {
  auto work = std::make_shared<Lookup<Number>>();
  work->x = x, work->table = static_cast<const Number*>(table), work->ids = ids, work->y = y, work->D = D, work->C = C;
  work->units = rows * ((C + work->TOGETHER - 1) / work->TOGETHER);
  return work;
}

ffi::Error LookUp(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer table, Ids ids, ffi::Result<Matrix> y) {
  auto by_rows = halves(table) ? look_up<Half> : look_up<float>;
  run(by_rows(x.typed_data(), table.untyped_data(), ids.typed_data(), x.dimensions()[0], x.dimensions()[1],
              ids.dimensions()[1], y->typed_data()), pool);
  return ffi::Error::Success();
}

// x + add, silu, and a layer norm, for each row of x; what is done between two products of the sampler head.
void pass(float* x, const float* add, int64_t stride, Vector& scale, Vector& shift, int64_t rows) {
  constexpr float EPSILON = 1e-5f;
  int64_t D = scale.dimensions()[0];
  for (int64_t row = 0; row < rows; ++row, x += D, add += stride) {
    Lanes sums = {};
    for (int64_t d = 0; d < D; d += LANES) {
      Lanes passed = silu(load(x + d, D - d) + load(add + d, D - d));
      sums += passed;  // of what lies behind a row silu makes 0
      store(passed, x + d, D - d);
    }
    float mean = sum<LANES>(reinterpret_cast<const float*>(&sums)) / D;
    for (int64_t d = 0; d < D; ++d) x[d] -= mean;
    norm(x, D, scale.typed_data(), EPSILON, x);
    for (int64_t d = 0; d < D; ++d) x[d] += shift.typed_data()[d];
  }
}

// The drafts of blocks of latents z behind tokens `first`: one after another the likeliest of a mask row's candidates by
// the sampler head, which reads the embedding of the one before.
ffi::Error Drafts(ffi::ThreadPool pool, Rows z, Rows scores, Ints first, ffi::AnyBuffer embedding, ffi::AnyBuffer table,
                  ffi::AnyBuffer reads_embedding, ffi::AnyBuffer reads_latent, Vector bias, Vector scale, Vector shift,
                  ffi::AnyBuffer second, Vector second_bias, Vector second_scale, Vector second_shift,
                  ffi::Result<Ids> y, int64_t candidates, bool residual) {
  int64_t B = z.dimensions()[0], M = z.dimensions()[1], D = z.dimensions()[2], C = candidates;
  std::vector<int64_t> columns{D};
  Numbers ends(columns.data(), 1);
  thread_local std::vector<float> read, h, latent, chosen_by;
  thread_local std::vector<int32_t> ids, best;
  read.resize(B * M * D), h.resize(B * D), latent.resize(B * D), chosen_by.resize(B * C);
  ids.resize(B * M * C), best.resize(B * C);

  auto project = [&](const float* x, int64_t rows, const ffi::AnyBuffer& w, float* to) {
    auto work = std::make_shared<Products>();
    work->x = {x, rows, D}, work->group.w = panels_of(w, ends), work->y = to;
    work->prepare(pool.num_threads());
    run(work, pool);
  };
  auto largest = [&](const float* x, int64_t rows, int64_t V, int32_t* to) {
    auto work = std::make_shared<Largest>();
    work->x = x, work->y = to, work->V = V, work->C = C, work->units = rows;
    run(work, pool);
  };
  largest(scores.typed_data(), B * M, scores.dimensions()[2], ids.data());
  project(z.typed_data(), B * M, reads_latent, read.data());
  for (int64_t i = 0; i < B * M * D; ++i) read[i] += bias.typed_data()[i % D];
  const int32_t* previous = first.typed_data();
  int64_t apart = 1;
  for (int64_t j = 0; j < M; ++j) {
    for (int64_t b = 0; b < B; ++b) copy_row(embedding, previous[b * apart], D, latent.data() + b * D);
    project(latent.data(), B, reads_embedding, h.data());
    pass(h.data(), read.data() + j * D, M * D, scale, shift, B);
    project(h.data(), B, second, latent.data());
    pass(latent.data(), second_bias.typed_data(), 0, second_scale, second_shift, B);
    if (residual)
      for (int64_t i = 0; i < B * D; ++i) latent[i] += z.typed_data()[(i / D * M + j) * D + i % D];
    for (int64_t b = 0; b < B; ++b) std::copy_n(ids.data() + (b * M + j) * C, C, best.data() + b * C);
    auto by_rows = halves(table) ? look_up<Half> : look_up<float>;
    run(by_rows(latent.data(), table.untyped_data(), best.data(), B, D, C, chosen_by.data()), pool);
    int32_t* drafts = y->typed_data() + j;
    for (int64_t b = 0; b < B; ++b) {
      const float* row = chosen_by.data() + b * C;
      drafts[b * M] = best[b * C + (std::max_element(row, row + C) - row)];
    }
    previous = drafts, apart = M;
  }
  return ffi::Error::Success();
}

ffi::Error LargestOf(ffi::ThreadPool pool, Matrix x, ffi::Result<Ids> y) {
  auto work = std::make_shared<Largest>();
  work->x = x.typed_data(), work->y = y->typed_data();
  work->V = x.dimensions()[1], work->C = y->dimensions()[1];
  work->units = x.dimensions()[0];
  run(work, pool);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int mtp_jax_panel_width() { return WIDTH; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_product, Plain,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>().Attr<Numbers>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_layers, Layers,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Ids>().Arg<ffi::AnyBuffer>().Arg<Matrix>().Arg<Heads>().Arg<Heads>()
        .Arg<Bounds>().Arg<Bounds>().Arg<Marks>().Arg<Ints>().Arg<Vector>().RemainingArgs().Ret<Rows>().RemainingRets()
        .Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_lookup, LookUp,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Arg<Ids>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_largest, LargestOf,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Ids>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_drafts, Drafts,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Rows>().Arg<Ints>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Vector>().Arg<Vector>().Arg<Vector>()
        .Arg<ffi::AnyBuffer>().Arg<Vector>().Arg<Vector>().Arg<Vector>().Ret<Ids>()
        .Attr<int64_t>("candidates").Attr<bool>("residual"));
