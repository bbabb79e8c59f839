// What a decoding step spends its time on, for few rows on CPU, called from compiled XLA programs: products with weights,
// with the LoRA for those rows that meet it, attention, and small things of which XLA would make many operations.
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
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Heads = ffi::Buffer<ffi::F32, 4>;
using Slots = ffi::Buffer<ffi::S32, 2>;
using Marks = ffi::Buffer<ffi::PRED, 3>;

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
constexpr int64_t AHEAD = 2048;  // numbers of a panel that are fetched before their turn
constexpr int64_t UNITS = 4;     // that a product is cut into for each thread

typedef float Lanes __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* from) {
  Lanes v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <int n>
inline float sum(const float* v) {
  typedef float Half __attribute__((vector_size(n * 2)));
  Half low, high;
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

// R rows of x, X apart, by a panel of K rows into `width` columns of y. Of the panel's rows every `every`-th, from number
// `fetch` on, lets what lies `ahead` of it be brought into cache, as long as it lies before `until`.
template <int R, bool ADD>
void panel(const float* x, int64_t X, const float* w, int64_t K, float* y, int64_t stride, int64_t width, int64_t ahead,
           const float* until, int fetch, int every) {
  Lanes acc[R][VECTORS] = {};
  for (int64_t k = 0; k < K; ++k, w += WIDTH) {
    if (fetch-- == 0) {
      const float* next = std::min(w + ahead, until);
      for (int c = 0; c < VECTORS; ++c) __builtin_prefetch(next + c * LANES);
      fetch = every - 1;
    }
    Lanes v[VECTORS];
    for (int c = 0; c < VECTORS; ++c) v[c] = load(w + c * LANES);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < VECTORS; ++c) acc[r][c] += x[r * X + k] * v[c];
  }
  for (int r = 0; r < R; ++r) {
    float* out = y + r * stride;
    float total[WIDTH];
    __builtin_memcpy(total, acc[r], sizeof total);
    if (ADD)
      for (int64_t n = 0; n < width; ++n) out[n] += total[n];
    else
      __builtin_memcpy(out, total, width * sizeof(float));
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
  const float* w = nullptr;
  int64_t K = 0, count = 0;
  ffi::Span<const int64_t> ends;

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
    int64_t groups = (in.rows + MOST - 1) / MOST;
    // Rows in one go leave memory no time: what comes soon is fetched. Rows in several share the next panel's rows.
    int64_t ahead = groups == 1 ? AHEAD : K * WIDTH;
    const float *first = w + p * K * WIDTH, *until = w + last * K * WIDTH - WIDTH;
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

// y = x w; for the last rows of each sequence y + inner b, inner = x a.
struct Products : Work {
  Input x;  // rows of all sequences
  Panels w, a, b;
  float *y, *inner = nullptr;
  int64_t N, C = 0, sequences = 1, lora_rows = 0, together = 1, inner_units = 0;
  ffi::Span<const int64_t> offsets;  // matrix i of w reads the columns of inner from offsets[i] on

  void prepare(int64_t threads) {
    together = std::clamp<int64_t>(w.count / (UNITS * threads), 1, 16);
    inner_units = lora_rows ? a.count : 0;
    units = inner_units + (w.count + together - 1) / together;
  }

  Input adapted(const Input& of, int64_t sequence) const {
    return {of.x + ((sequence + 1) * (of.rows / sequences) - lora_rows) * of.stride, lora_rows, of.stride};
  }

  void unit(int64_t u) override {
    if (u < inner_units) {
      Panels::Place at = a.place(u);
      for (int64_t i = 0; i < sequences; ++i) a.times<false>(adapted(x, i), u, at, u + 1, inner + i * lora_rows * C, C);
      return;
    }
    int64_t first = (u - inner_units) * together, last = std::min(w.count, first + together);
    for (int64_t p = first; p < last; ++p) w.times<false>(x, p, w.place(p), last, y, N);
    if (!lora_rows) return;
    while (finished.load(std::memory_order_acquire) < inner_units) pause();  // those units were taken before this one
    int64_t R = x.rows / sequences;
    for (int64_t p = first; p < last; ++p) {
      Panels::Place at = b.place(p);
      for (int64_t i = 0; i < sequences; ++i)
        b.times<true>({inner + i * lora_rows * C + offsets[at.part], lora_rows, C}, p, at, last,
                      y + ((i + 1) * R - lora_rows) * N, N);
    }
  }
};

// R rows of q, X apart, by C keys [., H], into y.
template <int R, int C>
void dots(const float* q, int64_t X, const float* keys, int64_t H, float* y, int64_t stride) {
  Lanes acc[R][C] = {};
  for (int64_t h = 0; h < H; h += LANES) {
    Lanes v[C];
    for (int c = 0; c < C; ++c) v[c] = load(keys + c * H + h);
    for (int r = 0; r < R; ++r) {
      Lanes u = load(q + r * X + h);
      for (int c = 0; c < C; ++c) acc[r][c] += u * v[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[r * stride + c] = sum<LANES>(reinterpret_cast<const float*>(&acc[r][c]));
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

// Attention of a step's rows over the slots [low, high) of a cache and over those of the step's own keys that each sees.
// Queries and keys come as they were projected and are rotated here.
struct Attention : Work {
  const float *projected, *cosine, *sine, *keys, *values;
  const int32_t *low, *high;
  const bool* seen;
  float *out, *own_keys, *own_values;
  int64_t R, N, K, H, S;

  // Head `head` of a row: its pairs (h, h + H/2) rotated by the row's angles, times `scale`.
  void rotate(int64_t row, int64_t head, float scale, float* to) const {
    const float *x = at(row, head), *c = cosine + row * H / 2, *s = sine + row * H / 2;
    for (int64_t h = 0; h < H / 2; ++h) {
      to[h] = (x[h] * c[h] - x[h + H / 2] * s[h]) * scale;
      to[h + H / 2] = (x[h + H / 2] * c[h] + x[h] * s[h]) * scale;
    }
  }
  const float* at(int64_t row, int64_t head) const { return projected + (row * (N + 2 * K) + head) * H; }

  void unit(int64_t u) override {  // one key/value head of one sequence
    int64_t sequence = u / K, head = u % K, group = N / K, rows = group * R;
    const int32_t *from = low + sequence * R, *to = high + sequence * R;
    int64_t begin = S, end = 0;
    for (int64_t r = 0; r < R; ++r)
      if (from[r] < to[r]) begin = std::min<int64_t>(begin, from[r]), end = std::max<int64_t>(end, to[r]);
    begin = std::min(begin, end);
    int64_t held = end - begin, width = (held + R + LANES - 1) / LANES * LANES;
    thread_local std::vector<float> scaled, scores;
    scaled.resize(rows * H);
    scores.resize(rows * width);
    float root = 1 / std::sqrt(static_cast<float>(H));
    for (int64_t row = 0; row < rows; ++row)  // row = r * group + which of the heads that share these keys
      rotate(sequence * R + row / group, head * group + row % group, root, scaled.data() + row * H);
    for (int64_t r = 0; r < R; ++r) {
      rotate(sequence * R + r, N + head, 1, own_keys + (u * R + r) * H);
      std::copy_n(at(sequence * R + r, N + K + head), H, own_values + (u * R + r) * H);
    }
    const float* k = keys + (u * S + begin) * H;
    const float* v = values + (u * S + begin) * H;
    scores_of<COLUMNS>(rows, scaled.data(), k, H, held, scores.data(), width);
    scores_of<COLUMNS>(rows, scaled.data(), own_keys + u * R * H, H, R, scores.data() + held, width);

    constexpr float NEVER = -3e38f;
    for (int64_t row = 0; row < rows; ++row) {
      float* score = scores.data() + row * width;
      int64_t r = row / group;
      std::fill(score, score + std::clamp<int64_t>(from[r] - begin, 0, held), NEVER);
      std::fill(score + std::clamp<int64_t>(to[r] - begin, 0, held), score + held, NEVER);
      for (int64_t i = 0; i < R; ++i)
        if (!seen[(sequence * R + r) * R + i]) score[held + i] = NEVER;
      std::fill(score + held + R, score + width, NEVER);
      float top = *std::max_element(score, score + width);
      Lanes total = {};
      for (int64_t i = 0; i < width; i += LANES) {
        Lanes e = exponential(load(score + i) - top);
        total += e;
        __builtin_memcpy(score + i, &e, sizeof e);
      }
      float all = sum<LANES>(reinterpret_cast<const float*>(&total));
      for (int64_t i = 0; i < width; ++i) score[i] /= all;
    }
    float* result = out + (sequence * R * N + head * group) * H;
    const float* own = own_values + u * R * H;
    for (int64_t row = 0; row < rows; row += 4)
      for (int64_t h = 0; h < H; h += LANES)
        switch (std::min<int64_t>(4, rows - row)) {
          case 1: weigh<1>(row, h, held, width, scores.data(), v, own, result); break;
          case 2: weigh<2>(row, h, held, width, scores.data(), v, own, result); break;
          case 3: weigh<3>(row, h, held, width, scores.data(), v, own, result); break;
          case 4: weigh<4>(row, h, held, width, scores.data(), v, own, result); break;
        }
  }

  template <int W>
  void weigh(int64_t row, int64_t h, int64_t held, int64_t width, const float* scores, const float* v, const float* own,
             float* result) const {
    Lanes acc[W] = {};
    const float* score = scores + row * width;
    for (int64_t s = 0; s < held + R; ++s) {
      Lanes value = load((s < held ? v + s * H : own + (s - held) * H) + h);
      for (int i = 0; i < W; ++i) acc[i] += score[i * width + s] * value;
    }
    int64_t group = N / K;
    for (int i = 0; i < W; ++i)
      __builtin_memcpy(result + (row + i) / group * N * H + (row + i) % group * H + h, &acc[i], sizeof acc[i]);
  }
};

// x / sqrt(mean(x^2) + epsilon) * scale for rows x, or for x + added, which is kept.
struct Norm : Work {
  static constexpr int64_t TOGETHER = 8;
  const float *x, *added, *scale;
  float *total, *y, epsilon;
  int64_t rows, D;

  void unit(int64_t u) override {
    for (int64_t row = u * TOGETHER; row < std::min(rows, (u + 1) * TOGETHER); ++row) {
      float* t = total + row * D;
      Lanes squares = {};
      float rest = 0;
      for (int64_t d = 0; d < D; ++d) t[d] = x[row * D + d] + added[row * D + d];
      int64_t d = 0;
      for (; d + LANES <= D; d += LANES) squares += load(t + d) * load(t + d);
      for (; d < D; ++d) rest += t[d] * t[d];
      rest += sum<LANES>(reinterpret_cast<const float*>(&squares));
      float by = 1 / std::sqrt(rest / D + epsilon);
      for (d = 0; d < D; ++d) y[row * D + d] = t[d] * by * scale[d];
    }
  }
};

// Rows of x by rows `ids` of a table.
struct Lookup : Work {
  static constexpr int64_t TOGETHER = 32;
  const float *x, *table;
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
      y[row * C + c] = dot(x + row * D, table + id[c] * D);
    }
  }
  void fetch(int64_t id) const {
    for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(table + id * D + d);
  }
  float dot(const float* a, const float* b) const {
    Lanes acc[2] = {};
    int64_t d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES)
      for (int c = 0; c < 2; ++c) acc[c] += load(a + d + c * LANES) * load(b + d + c * LANES);
    float rest = 0;
    for (; d < D; ++d) rest += a[d] * b[d];
    acc[0] += acc[1];
    return rest + sum<LANES>(reinterpret_cast<const float*>(&acc[0]));
  }
};

// The first index of the largest number of each class of a row: class c has the numbers c, c + C, c + 2C, ...
struct Largest : Work {
  const float* x;
  int32_t* y;
  int64_t V, C;

  void unit(int64_t row) override {
    if (C > 1) return classes(x + row * V, C, y + row * C);
    int32_t best[64];  // one class alone would be compared number after number
    int64_t count = std::min<int64_t>(V, 64);
    const float* numbers = x + row * V;
    classes(numbers, count, best);
    int32_t top = best[0];
    for (int64_t c = 1; c < count; ++c)
      if (numbers[best[c]] > numbers[top] || (numbers[best[c]] == numbers[top] && best[c] < top)) top = best[c];
    y[row] = top;
  }

  void classes(const float* numbers, int64_t count, int32_t* best) const {
    thread_local std::vector<float> top;
    top.assign(numbers, numbers + count);
    float* held = top.data();
    for (int64_t c = 0; c < count; ++c) best[c] = static_cast<int32_t>(c);
    for (int64_t from = count; from < V; from += count)
      for (int64_t c = 0; c < std::min(count, V - from); ++c) {
        float next = numbers[from + c];
        best[c] = next > held[c] ? static_cast<int32_t>(from + c) : best[c];
        held[c] = next > held[c] ? next : held[c];
      }
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

using Numbers = ffi::Span<const int64_t>;

Panels panels_of(const Rows& w, Numbers ends) {
  return {w.typed_data(), w.dimensions()[1], w.dimensions()[0], ends};
}

ffi::Error Plain(ffi::ThreadPool pool, Matrix x, Rows w, ffi::Result<Matrix> y, Numbers ends) {
  auto work = std::make_shared<Products>();
  work->x = {x.typed_data(), x.dimensions()[0], x.dimensions()[1]};
  work->w = panels_of(w, ends);
  work->N = y->dimensions()[1];
  work->y = y->typed_data();
  work->prepare(pool.num_threads());
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error Adapted(ffi::ThreadPool pool, Rows x, Rows w, Rows a, Rows b, ffi::Result<Rows> y, ffi::Result<Rows> inner,
                   Numbers ends, Numbers inner_ends, Numbers offsets) {
  auto work = std::make_shared<Products>();
  auto shape = x.dimensions();
  work->sequences = shape[0];
  work->x = {x.typed_data(), shape[0] * shape[1], shape[2]};
  work->w = panels_of(w, ends), work->b = panels_of(b, ends), work->a = panels_of(a, inner_ends);
  work->N = y->dimensions()[2];
  work->y = y->typed_data();
  work->lora_rows = inner->dimensions()[1];
  work->C = inner->dimensions()[2];
  work->inner = inner->typed_data();
  work->offsets = offsets;
  work->prepare(pool.num_threads());
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, Heads projected, Heads cosine, Heads sine, Heads keys, Heads values, Slots low,
                  Slots high, Marks seen, ffi::Result<Heads> out, ffi::Result<Heads> own_keys,
                  ffi::Result<Heads> own_values) {
  auto work = std::make_shared<Attention>();
  auto shape = out->dimensions(), cache = keys.dimensions();
  work->projected = projected.typed_data(), work->cosine = cosine.typed_data(), work->sine = sine.typed_data();
  work->keys = keys.typed_data(), work->values = values.typed_data();
  work->low = low.typed_data(), work->high = high.typed_data(), work->seen = seen.typed_data();
  work->out = out->typed_data(), work->own_keys = own_keys->typed_data(), work->own_values = own_values->typed_data();
  work->R = shape[1], work->N = shape[2], work->H = shape[3], work->K = cache[1], work->S = cache[2];
  work->units = shape[0] * work->K;
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error AddNorm(ffi::ThreadPool pool, Matrix x, Matrix added, Vector scale, ffi::Result<Matrix> total,
                   ffi::Result<Matrix> y, float epsilon) {
  auto work = std::make_shared<Norm>();
  work->x = x.typed_data(), work->added = added.typed_data(), work->scale = scale.typed_data();
  work->total = total->typed_data(), work->y = y->typed_data(), work->epsilon = epsilon;
  work->rows = x.dimensions()[0], work->D = x.dimensions()[1];
  work->units = (work->rows + Norm::TOGETHER - 1) / Norm::TOGETHER;
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error LookUp(ffi::ThreadPool pool, Matrix x, Matrix table, Slots ids, ffi::Result<Matrix> y) {
  auto work = std::make_shared<Lookup>();
  work->x = x.typed_data(), work->table = table.typed_data(), work->ids = ids.typed_data(), work->y = y->typed_data();
  work->D = x.dimensions()[1], work->C = ids.dimensions()[1];
  work->units = x.dimensions()[0] * ((work->C + Lookup::TOGETHER - 1) / Lookup::TOGETHER);
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error LargestOf(ffi::ThreadPool pool, Matrix x, ffi::Result<Slots> y) {
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
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Rows>().Ret<Matrix>().Attr<Numbers>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_adapted_product, Adapted,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Rows>().Arg<Rows>().Arg<Rows>().Ret<Rows>().Ret<Rows>()
        .Attr<Numbers>("ends").Attr<Numbers>("inner_ends").Attr<Numbers>("offsets"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_attention, Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Heads>().Arg<Heads>().Arg<Heads>().Arg<Heads>().Arg<Heads>().Arg<Slots>()
        .Arg<Slots>().Arg<Marks>().Ret<Heads>().Ret<Heads>().Ret<Heads>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_add_norm, AddNorm,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Arg<Vector>().Ret<Matrix>().Ret<Matrix>()
        .Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_lookup, LookUp,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Arg<Slots>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_largest, LargestOf,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Slots>());
