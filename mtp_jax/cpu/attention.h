// Attention of a step's rows over a cache and over one another.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"
#include "work.h"

namespace mtp_jax {

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

}  // namespace mtp_jax
