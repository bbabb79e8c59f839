// y = x w is bound by reading w. It lies in panels of some columns, each from its first row to its last, so that it is
// read once and in the order of addresses: memory then gives twice of what it gives to several streams. Each number
// of a row of x meets a vector of a panel's row, and all rows of x meet it while it is in a register. Every sum runs over k
// in one order, so that a row's result does not depend on how many rows there are beside it.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"
#include "work.h"

namespace mtp_jax {

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

inline void load_row(const int8_t* from, Lanes (&v)[VECTORS]) {
  for (int c = 0; c < VECTORS; ++c) v[c] = load(from + c * LANES);
}

// Rows that meet a panel: of floats, or of whole numbers.
struct FloatRows {
  const float* x;
  int64_t stride;

  FloatRows from(int64_t row) const { return {x + row * stride, stride}; }
};

struct WholeRows {
  Rounded x;
  int64_t K;  // numbers of a row

  WholeRows from(int64_t row) const { return {x.row(row, K), K}; }
};

// Of the steps through a panel every `every`-th, from number `next` on, lets what lies `ahead` of it be brought into cache,
// as long as it lies before `until`: into the second level, which awaits more lines at a time than the first.
template <typename Number>
struct Fetch {
  int64_t ahead;
  const Number* until;
  int next, every;

  // What a step at w is to bring; w itself where it brings nothing.
  const Number* at(const Number* w) {
    if (next-- != 0) return w;
    next = every - 1;
    return std::min(w + ahead, until);
  }
};

template <typename Number>
inline void bring(const Number* from, int64_t count) {
  for (int64_t n = 0; n < count; n += LINE / sizeof(Number)) __builtin_prefetch(from + n, 0, 1);
}

// The sums of R rows by a panel of K rows.
template <int R, typename Number>
inline void sums(FloatRows x, const Number* w, int64_t K, Fetch<Number> fetch, Lanes (&acc)[R][VECTORS]) {
  for (int64_t k = 0; k < K; ++k, w += WIDTH) {
    if (const Number* next = fetch.at(w); next != w) bring(next, WIDTH);
    Lanes v[VECTORS];
    load_row(w, v);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < VECTORS; ++c) acc[r][c] += x.x[r * x.stride + k] * v[c];
  }
}

#if defined(__AVX512VNNI__)
// What the products of `count` whole numbers, a block of each row or what is left for the last, add to the sums. One
// instruction adds four products, those of the panel without sign: its numbers were made larger by 128.
template <int R>
inline void meet(const Rounded (&rows)[R], int64_t b, int64_t count, const uint8_t* w, const uint8_t* next,
                 Lanes (&acc)[R][VECTORS]) {
  __m512i whole[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < VECTORS; ++c) whole[r][c] = _mm512_set1_epi32(rows[r].offsets[b]);
#pragma GCC unroll 8
  for (int64_t k = 0; k < count; k += 4) {
    bring(next + k * WIDTH, 4 * WIDTH);  // no branch: what is there costs nothing
    __m512i v[VECTORS];
    for (int c = 0; c < VECTORS; ++c) v[c] = _mm512_loadu_si512(w + k * WIDTH + c * LANES * 4);
    for (int r = 0; r < R; ++r) {
      int32_t numbers;
      __builtin_memcpy(&numbers, rows[r].numbers + b * BLOCK + k, sizeof numbers);
      for (int c = 0; c < VECTORS; ++c) whole[r][c] = _mm512_dpbusd_epi32(whole[r][c], v[c], _mm512_set1_epi32(numbers));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < VECTORS; ++c)
      acc[r][c] = multiply_add(Lanes{} + rows[r].scales[b], __builtin_convertvector((Wholes)whole[r][c], Lanes), acc[r][c]);
}

template <int R>
inline void sums(WholeRows x, const uint8_t* w, int64_t K, Fetch<uint8_t> fetch, Lanes (&acc)[R][VECTORS]) {
  Rounded rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.from(r).x;
  int64_t b = 0;
  for (; (b + 1) * BLOCK <= K; ++b, w += BLOCK * WIDTH) meet<R>(rows, b, BLOCK, w, fetch.at(w), acc);
  if (b * BLOCK < K) meet<R>(rows, b, K - b * BLOCK, w, w, acc);
}
#endif

// R rows by a panel of K rows, with a scale for each column or none, into `width` columns of y.
template <int R, bool ADD, typename Rows, typename Number>
void panel(Rows x, const Number* w, int64_t K, float* y, int64_t stride, int64_t width, Fetch<Number> fetch,
           const float* scale) {
  Lanes acc[R][VECTORS] = {};
  sums<R>(x, w, K, fetch, acc);
  for (int r = 0; r < R; ++r) {
    float* out = y + r * stride;
    float total[WIDTH];
    __builtin_memcpy(total, acc[r], sizeof total);
    for (int64_t n = 0; n < width; n += LANES) {
      Lanes found = load(total + n), before = ADD ? load(out + n, width - n) : Lanes{};
      store(scale ? multiply_add(found, load(scale + n, width - n), before) : found + before, out + n, width - n);
    }
  }
}

template <int R, bool ADD, typename Rows, typename... Rest>
void panel_by(int64_t rows, Rows x, Rest... rest) {
  if constexpr (R > 0) {
    if (rows == R) return panel<R, ADD>(x, rest...);
    panel_by<R - 1, ADD>(rows, x, rest...);
  }
}

// Numbers that somebody else holds.
struct Numbers {
  const int64_t* data = nullptr;
  size_t count = 0;

  int64_t operator[](size_t i) const { return data[i]; }
  size_t size() const { return count; }
  int64_t last() const { return data[count - 1]; }
};

// Rows of x, `stride` apart; and, where whole numbers meet whole numbers, as such.
struct Input {
  const float* x = nullptr;
  int64_t rows = 0, stride = 0;
  Rounded rounded = {};

  Input from(int64_t row, int64_t count) const {
    return {x + row * stride, count, stride, rounded.numbers ? rounded.row(row, stride) : rounded};
  }
};

// Numbers of a matrix. BYTES are multiplied as floats, FOURS meet rows of whole numbers: each four of a column lie side by
// side, larger by 128.
enum class Kind { FLOATS, HALVES, BYTES, FOURS };

// A matrix of K rows in panels. It joins matrices that end at columns `ends`, each of which begins a panel of its own.
struct Panels {
  const void* w = nullptr;
  Kind kind = Kind::FLOATS;
  int64_t K = 0, count = 0;  // rows, and panels
  Numbers ends;
  const float* scale = nullptr;  // of each column, where numbers are whole

  bool whole() const { return kind == Kind::BYTES || kind == Kind::FOURS; }

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
    FloatRows x{in.x, in.stride};
    if (kind == Kind::HALVES)
      times<ADD, MOST>(static_cast<const Half*>(w), x, in.rows, p, at, last, y, N);
    else if (kind == Kind::BYTES)
      times<ADD, MOST>(static_cast<const int8_t*>(w), x, in.rows, p, at, last, y, N);
    else if (kind == Kind::FLOATS)
      times<ADD, MOST>(static_cast<const float*>(w), x, in.rows, p, at, last, y, N);
#if defined(__AVX512VNNI__)
    else  // a row has two sums
      times<ADD, MOST / 2>(static_cast<const uint8_t*>(w), WholeRows{in.rounded, in.stride}, in.rows, p, at, last, y, N);
#endif
  }

  template <bool ADD, int AT_MOST, typename Rows, typename Number>
  void times(const Number* w, Rows x, int64_t count, int64_t p, const Place& at, int64_t last, float* y, int64_t N) const {
    int64_t groups = (count + AT_MOST - 1) / AT_MOST;
    // Rows in one go leave memory no time: what comes soon is fetched. Rows in several share the next panel's rows.
    int64_t ahead = groups == 1 ? AHEAD / sizeof(Number) : K * WIDTH;
    const Number *first = w + p * K * WIDTH, *until = w + last * K * WIDTH - (kind == Kind::FOURS ? BLOCK : 1) * WIDTH;
    for (int64_t g = 0, row = 0; g < groups; ++g) {
      int64_t rows = (count - row + groups - g - 1) / (groups - g);
      Fetch<Number> fetch{ahead, until, static_cast<int>(g), static_cast<int>(groups)};
      panel_by<AT_MOST, ADD>(rows, x.from(row), first, K, y + row * N + at.column, N, at.width, fetch,
                             scale ? scale + at.column : nullptr);
      row += rows;
    }
  }
};

// Matrices that one input meets: a bias, and the LoRA b (a x) of rows that meet it, are added.
struct Group {
  Panels w, a, b;
  const float* bias = nullptr;
  Numbers offsets;  // matrix i of w reads the columns of a x from offsets[i] on

  int64_t width() const { return w.ends.last(); }
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
    return of.from((sequence + 1) * (of.rows / sequences) - lora_rows, lora_rows);
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

}  // namespace mtp_jax
