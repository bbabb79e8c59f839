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

// R rows of x, X apart, by a panel of K rows, with a scale for each column or none, into `width` columns of y. Of the
// panel's rows every `every`-th, from number `fetch` on, lets what lies `ahead` of it be brought into cache, as long as it
// lies before `until`.
template <int R, bool ADD, typename Number>
void panel(const float* x, int64_t X, const Number* w, int64_t K, float* y, int64_t stride, int64_t width, int64_t ahead,
           const Number* until, int fetch, int every, const float* scale) {
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
    for (int64_t n = 0; n < width; n += LANES) {
      Lanes y = scale ? load(total + n) * load(scale + n, width - n) : load(total + n);
      store(ADD ? load(out + n, width - n) + y : y, out + n, width - n);
    }
  }
}

template <int R, bool ADD, typename... Rest>
void panel_by(int64_t rows, const float* x, int64_t X, Rest... rest) {
  if constexpr (R > 0) {
    if (rows == R) return panel<R, ADD>(x, X, rest...);
    panel_by<R - 1, ADD>(rows, x, X, rest...);
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

// Rows of x, `stride` apart.
struct Input {
  const float* x = nullptr;
  int64_t rows = 0, stride = 0;
};

enum class Kind { FLOATS, HALVES, BYTES };

// A matrix of K rows in panels. It joins matrices that end at columns `ends`, each of which begins a panel of its own.
struct Panels {
  const void* w = nullptr;
  Kind kind = Kind::FLOATS;
  int64_t K = 0, count = 0;
  Numbers ends;
  const float* scale = nullptr;  // of each column, where numbers are whole

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
    if (kind == Kind::HALVES)
      times<ADD>(static_cast<const Half*>(w), in, p, at, last, y, N);
    else if (kind == Kind::BYTES)
      times<ADD>(static_cast<const int8_t*>(w), in, p, at, last, y, N);
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
                          until, static_cast<int>(g), static_cast<int>(groups), scale ? scale + at.column : nullptr);
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

}  // namespace mtp_jax
