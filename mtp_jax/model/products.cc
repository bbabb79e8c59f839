// What a decoding step spends its time on, for few rows on CPU, called from compiled XLA programs: products with weights,
// with the LoRA for those rows that meet it, and attention.
//
// y = x w^T is bound by reading w. XLA's own products first copy w into another order;
// here each row of w is read once, where it lies, and meets all rows of x while it is in cache, and the rows of w that
// come next are fetched meanwhile. Every sum runs over k in one order, so that a row's result does not depend on how many
// rows there are beside it.

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
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Heads = ffi::Buffer<ffi::F32, 4>;
using Slots = ffi::Buffer<ffi::S32, 2>;
using Marks = ffi::Buffer<ffi::PRED, 3>;

namespace {

// Registers: R x C accumulators, C vectors of w and one of x. More rows of x, fewer of w.
#if defined(__AVX512F__)
constexpr int LANES = 16, FEW = 6, FEW_COLUMNS = 4, MANY = 9, MANY_COLUMNS = 3;
#elif defined(__AVX__)
constexpr int LANES = 8, FEW = 3, FEW_COLUMNS = 4, MANY = 6, MANY_COLUMNS = 2;
#else
constexpr int LANES = 4, FEW = 6, FEW_COLUMNS = 4, MANY = 9, MANY_COLUMNS = 3;
#endif
constexpr int64_t UNIT = 24;  // columns of y that a thread takes at a time

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

// R rows of x, X apart, by C rows of w [., K] into y. Of the C rows of w that follow these, those numbered `fetch`,
// `fetch + every`, ... are brought into cache.
template <int R, int C, bool ADD>
void block(const float* x, int64_t X, const float* w, int64_t K, float* y, int64_t stride, int fetch, int every) {
  Lanes acc[R][C] = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    for (int c = fetch; c < C; c += every) __builtin_prefetch(w + (C + c) * K + k);
    Lanes v[C];
    for (int c = 0; c < C; ++c) v[c] = load(w + c * K + k);
    for (int r = 0; r < R; ++r) {
      Lanes u = load(x + r * X + k);
      for (int c = 0; c < C; ++c) acc[r][c] += u * v[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float total = sum<LANES>(reinterpret_cast<const float*>(&acc[r][c]));
      for (int64_t rest = k; rest < K; ++rest) total += x[r * X + rest] * w[c * K + rest];
      y[r * stride + c] = ADD ? y[r * stride + c] + total : total;
    }
}

template <int R, int C, bool ADD>
void group(int rows, const float* x, int64_t X, const float* w, int64_t K, float* y, int64_t stride, int fetch, int every) {
  if constexpr (R > 0) {
    if (rows == R) return block<R, C, ADD>(x, X, w, K, y, stride, fetch, every);
    group<R - 1, C, ADD>(rows, x, X, w, K, y, stride, fetch, every);
  }
}

struct Product {
  const float *x = nullptr, *w = nullptr;
  int64_t rows = 0, K = 0, x_stride = K;

  // Columns [column, column + C) of y.
  template <int C, bool ADD>
  void columns(int64_t column, float* y, int64_t N) const {
    constexpr int most = C == MANY_COLUMNS ? MANY : FEW;
    int64_t groups = (rows + most - 1) / most;
    for (int64_t g = 0, row = 0; g < groups; ++g) {
      int64_t count = (rows - row + groups - g - 1) / (groups - g);
      group<most, C, ADD>(count, x + row * x_stride, x_stride, w + column * K, K, y + row * N + column, N, g, groups);
      row += count;
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

// y = x w^T; for the last rows of each sequence y + inner b^T, inner = x a^T.
struct Products : Work {
  Product base;  // rows of all sequences
  float* y;
  int64_t N, sequences = 1, lora_rows = 0;
  Product a;  // x is set for each sequence
  const float* b;
  float* inner;
  int64_t C, rank, inner_units = 0;
  ffi::Span<const int64_t> ends, offsets;  // columns up to ends[i] read the rank inner columns from offsets[i] on

  void prepare() {
    inner_units = lora_rows ? (C + UNIT - 1) / UNIT : 0;
    units = inner_units + (N + UNIT - 1) / UNIT;
  }

  void unit(int64_t u) override {
    base.rows <= FEW ? any<FEW_COLUMNS>(u) : any<MANY_COLUMNS>(u);
  }

  template <int W>
  void any(int64_t u) {
    int64_t R = base.rows / sequences;
    if (u < inner_units) {
      for (int64_t i = 0; i < sequences; ++i) {
        Product own = a;
        own.x = base.x + ((i + 1) * R - lora_rows) * base.K;
        range<W, false>(own, u * UNIT, std::min(C, (u + 1) * UNIT), inner + i * lora_rows * C, C);
      }
      return;
    }
    int64_t begin = (u - inner_units) * UNIT, end = std::min(N, begin + UNIT);
    range<W, false>(base, begin, end, y, N);
    if (!lora_rows) return;
    while (finished.load(std::memory_order_acquire) < inner_units) pause();  // those units were taken before this one
    for (size_t part = 0; begin < end; ++part) {
      if (begin >= ends[part]) continue;
      int64_t until = std::min(end, ends[part]);
      for (int64_t i = 0; i < sequences; ++i) {
        Product own{inner + i * lora_rows * C + offsets[part], b, lora_rows, rank, C};
        range<W, true>(own, begin, until, y + ((i + 1) * R - lora_rows) * N, N);
      }
      begin = until;
    }
  }

  template <int W, bool ADD>
  static void range(const Product& product, int64_t column, int64_t end, float* y, int64_t N) {
    for (; column + W <= end; column += W) product.columns<W, ADD>(column, y, N);
    for (; column < end; ++column) product.columns<1, ADD>(column, y, N);
  }
};

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
struct Attention : Work {
  const float *q, *keys, *values, *own_keys, *own_values;
  const int32_t *low, *high;
  const bool* seen;
  float* out;
  int64_t R, N, K, H, S;

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
    const float* first = q + (sequence * R * N + head * group) * H;
    float root = 1 / std::sqrt(static_cast<float>(H));
    for (int64_t row = 0; row < rows; ++row)  // row = r * group + which of the heads that share these keys
      for (int64_t h = 0; h < H; ++h) scaled[row * H + h] = first[row / group * N * H + row % group * H + h] * root;
    const float* k = keys + (u * S + begin) * H;
    const float* v = values + (u * S + begin) * H;
    Products::range<FEW_COLUMNS, false>({scaled.data(), k, rows, H}, 0, held, scores.data(), width);
    Products::range<FEW_COLUMNS, false>({scaled.data(), own_keys + u * R * H, rows, H}, 0, R, scores.data() + held, width);

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

ffi::Error Plain(ffi::ThreadPool pool, Matrix x, Matrix w, ffi::Result<Matrix> y) {
  auto work = std::make_shared<Products>();
  work->base = {x.typed_data(), w.typed_data(), x.dimensions()[0], x.dimensions()[1]};
  work->N = w.dimensions()[0];
  work->y = y->typed_data();
  work->prepare();
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error Adapted(ffi::ThreadPool pool, Rows x, Matrix w, Matrix a, Matrix b, ffi::Result<Rows> y,
                   ffi::Result<Rows> inner, ffi::Span<const int64_t> ends, ffi::Span<const int64_t> offsets) {
  auto work = std::make_shared<Products>();
  auto shape = x.dimensions();
  work->sequences = shape[0];
  work->base = {x.typed_data(), w.typed_data(), shape[0] * shape[1], shape[2]};
  work->N = w.dimensions()[0];
  work->y = y->typed_data();
  work->lora_rows = inner->dimensions()[1];
  work->a = {nullptr, a.typed_data(), work->lora_rows, shape[2]};
  work->b = b.typed_data();
  work->inner = inner->typed_data();
  work->C = a.dimensions()[0];
  work->rank = b.dimensions()[1];
  work->ends = ends;
  work->offsets = offsets;
  work->prepare();
  run(work, pool);
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, Heads q, Heads keys, Heads values, Heads own_keys, Heads own_values,
                  Slots low, Slots high, Marks seen, ffi::Result<Heads> out) {
  auto work = std::make_shared<Attention>();
  auto shape = q.dimensions(), cache = keys.dimensions();
  work->q = q.typed_data(), work->keys = keys.typed_data(), work->values = values.typed_data();
  work->own_keys = own_keys.typed_data(), work->own_values = own_values.typed_data();
  work->low = low.typed_data(), work->high = high.typed_data(), work->seen = seen.typed_data();
  work->out = out->typed_data();
  work->R = shape[1], work->N = shape[2], work->H = shape[3], work->K = cache[1], work->S = cache[2];
  work->units = shape[0] * work->K;
  run(work, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_product, Plain,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_adapted_product, Adapted,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Matrix>().Arg<Matrix>().Arg<Matrix>().Ret<Rows>().Ret<Rows>()
        .Attr<ffi::Span<const int64_t>>("ends").Attr<ffi::Span<const int64_t>>("offsets"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_attention, Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Heads>().Arg<Heads>().Arg<Heads>().Arg<Heads>().Arg<Heads>()
        .Arg<Slots>().Arg<Slots>().Arg<Marks>().Ret<Heads>());
