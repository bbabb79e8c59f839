// Attention of a step's rows over a cache and over one another.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"
#include "work.h"

namespace mtp_jax {

// Rows of a square change places with its columns: of pairs of rows S apart each takes half of the other's numbers.
template <int S = LANES / 2>
inline void transpose(Lanes (&v)[LANES]) {
  if constexpr (S > 0) {
    Wholes low = {}, high = {};
    for (int l = 0; l < LANES; ++l) low[l] = l & S ? LANES + l - S : l, high[l] = l & S ? LANES + l : l + S;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & S) continue;
      Lanes a = v[i], b = v[i + S];
      v[i] = chosen(a, b, low), v[i + S] = chosen(a, b, high);
    }
    transpose<S / 2>(v);
  }
}

// `count` keys [., H], of which a vector has as many, so that the numbers h of all of them lie side by side.
inline void by_number(const float* keys, int64_t H, int64_t count, float* to) {
  for (int64_t h = 0; h < H; h += LANES) {
    Lanes v[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = i < count ? load(keys + i * H + h, H - h) : Lanes{};
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (h + i < H) store(v[i], to + (h + i) * LANES, LANES);
  }
}

// R rows of q by the keys of `by_number`, of which there are `count`. Every sum runs over h in one order.
template <int R>
void dots(const float* q, const float* keys, int64_t H, int64_t count, float* y, int64_t stride) {
  Lanes acc[R] = {};
  for (int64_t h = 0; h < H; ++h) {
    Lanes v = load(keys + h * LANES);
    for (int r = 0; r < R; ++r) acc[r] += q[r * H + h] * v;
  }
  for (int r = 0; r < R; ++r) store(acc[r], y + r * stride, count);
}

template <int R>
void dots_by(int64_t rows, const float* q, const float* keys, int64_t H, int64_t count, float* y, int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return dots<R>(q, keys, H, count, y, stride);
    dots_by<R - 1>(rows, q, keys, H, count, y, stride);
  }
}

// All rows of q by `count` keys.
inline void scores_of(int64_t rows, const float* q, const float* keys, int64_t H, int64_t count, float* y,
                      int64_t stride) {
  thread_local std::vector<float> tile;
  tile.resize(H * LANES);
  for (int64_t first = 0; first < count; first += LANES, y += LANES) {
    int64_t some = std::min<int64_t>(LANES, count - first);
    by_number(keys + first * H, H, some, tile.data());
    for (int64_t r = 0; r < rows; r += MOST)
      dots_by<MOST>(std::min<int64_t>(MOST, rows - r), q + r * H, tile.data(), H, some, y + r * stride, stride);
  }
}

// What rows attend to: the `held` values of a cache, and behind them own ones, up to `all`.
struct Values {
  const float *cached, *own;
  int64_t H, held, all;

  const float* at(int64_t s) const { return s < held ? cached + s * H : own + (s - held) * H; }
};

// Shares of W rows, each `stride` apart, of the values' C vectors from number h on, or of what is left of one.
template <int W, int C>
inline void weigh(const Values& of, int64_t h, const float* share, int64_t stride, Lanes (&acc)[W][C]) {
  for (int64_t s = 0; s < of.all; ++s) {
    Lanes v[C];
    for (int c = 0; c < C; ++c) v[c] = load(of.at(s) + h + c * LANES, of.H - h);
    for (int i = 0; i < W; ++i)
      for (int c = 0; c < C; ++c) acc[i][c] += share[i * stride + s] * v[c];
  }
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
    int64_t mine = 0;  // own rows up to the last that one of these sees
    for (int64_t r = first / group; r <= (first + rows - 1) / group; ++r)
      for (int64_t o = R; o > mine; --o)
        if (seen[(sequence * R + r) * R + o - 1]) mine = o;
    int64_t held = end - begin, all = held + mine, width = (all + LANES - 1) / LANES * LANES;
    thread_local std::vector<float> scaled, scores, by;
    scaled.resize(rows * H), by.resize(rows);
    scores.resize(rows * width);
    float root = 1 / std::sqrt(static_cast<float>(H));
    for (int64_t i = 0; i < rows; ++i) {
      int64_t row = first + i;
      rotate(sequence * R + row / group, head * group + row % group, q_scale, root, scaled.data() + i * H);
    }
    const float *k = keys + (u * S + begin) * H, *v = values + (u * S + begin) * H;
    scores_of(rows, scaled.data(), k, H, held, scores.data(), width);
    scores_of(rows, scaled.data(), own_keys + u * R * H, H, mine, scores.data() + held, width);

    constexpr float NEVER = -3e38f;
    for (int64_t i = 0; i < rows; ++i) {
      float* score = scores.data() + i * width;
      int64_t r = (first + i) / group;
      std::fill(score, score + std::clamp<int64_t>(from[r] - begin, 0, held), NEVER);
      std::fill(score + std::clamp<int64_t>(to[r] - begin, 0, held), score + held, NEVER);
      for (int64_t o = 0; o < mine; ++o)
        if (!seen[(sequence * R + r) * R + o]) score[held + o] = NEVER;
      std::fill(score + all, score + width, NEVER);
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
      by[i] = 1 / sum<LANES>(reinterpret_cast<const float*>(&total));
    }
    Values of{v, own_values + u * R * H, H, held, all};
    for (int64_t i = 0; i < rows; i += FEW)
      attend_by<FEW>(std::min<int64_t>(FEW, rows - i), u, first + i, of, scores.data() + i * width, width, by.data() + i);
  }

  template <int W>
  void attend_by(int64_t rows, int64_t u, int64_t row, const Values& of, const float* share, int64_t stride,
                 const float* by) const {
    if constexpr (W > 0) {
      if (rows != W) return attend_by<W - 1>(rows, u, row, of, share, stride, by);
      int64_t h = 0;
      for (; h + COLUMNS * LANES <= H; h += COLUMNS * LANES) some<W, COLUMNS>(u, row, h, of, share, stride, by);
      for (; h < H; h += LANES) some<W, 1>(u, row, h, of, share, stride, by);
    }
  }

  // Numbers of W rows' results from h on.
  template <int W, int C>
  void some(int64_t u, int64_t row, int64_t h, const Values& of, const float* share, int64_t stride,
            const float* by) const {
    Lanes acc[W][C] = {};
    weigh(of, h, share, stride, acc);
    int64_t group = N / K, sequence = u / K, head = u % K * group;
    for (int i = 0; i < W; ++i) {
      float* to = out + ((sequence * R + (row + i) / group) * N + head + (row + i) % group) * H + h;
      for (int c = 0; c < C; ++c) store(acc[i][c] * by[i], to + c * LANES, H - h);
    }
  }
};

}  // namespace mtp_jax
