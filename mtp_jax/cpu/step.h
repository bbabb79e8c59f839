// A decoding step of few rows on a CPU, without any of XLA: all layers, and the largest of many numbers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "attention.h"
#include "products.h"
#include "vectors.h"
#include "work.h"

namespace mtp_jax {

// y = norm(x), or silu(gate) * up for rows x of gate and up side by side, or x itself; as whole numbers too if asked for.
struct ByRow : Work {
  enum class What { NORM, GATE, NOTHING } what;
  const float *x, *scale = nullptr;
  float *y, epsilon;
  int64_t D;  // numbers of a row of y
  Rounded rounded;

  void unit(int64_t row) override {
    if (what == What::NORM) norm(x + row * D, D, scale, epsilon, y + row * D);
    if (what == What::GATE) gate(x + row * 2 * D, y + row * D);
    if (rounded.numbers) round_row((what == What::NOTHING ? x : y) + row * D, D, rounded.row(row, D));
  }

  void gate(const float* gates, float* to) const {
    for (int64_t d = 0; d < D; d += LANES)
      store(silu(load(gates + d, D - d)) * load(gates + D + d, D - d), to + d, D - d);
  }
};

// Where rows of whole numbers lie.
struct Roundings {
  std::vector<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Rounded of(int64_t rows, int64_t K) {
    numbers.resize(rows * Rounded::width(K));
    scales.resize(rows * Rounded::blocks(K)), offsets.resize(rows * Rounded::blocks(K));
    return {numbers.data(), scales.data(), offsets.data()};
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
    if (C == 1) {
      y[row] = first_largest(numbers);
      return;
    }
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

  int32_t first_largest(const float* numbers) const {
    Lanes tops[4];
    std::fill_n(tops, 4, Lanes{} + LEAST);
    int64_t v = 0;
    for (; v + 4 * LANES <= V; v += 4 * LANES)
      for (int i = 0; i < 4; ++i) {
        Lanes next = load(numbers + v + i * LANES);
        tops[i] = next > tops[i] ? next : tops[i];
      }
    for (int i = 1; i < 4; ++i) tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
    float top = fold<LANES>(reinterpret_cast<const float*>(tops), [](auto a, auto b) { return a > b ? a : b; });
    for (; v < V; ++v) top = numbers[v] > top ? numbers[v] : top;
    const float* found = std::find(numbers, numbers + V, top);
    return static_cast<int32_t>(found == numbers + V ? 0 : found - numbers);
  }

  // The C-th largest, which moves numbers about.
  float least(std::vector<float>& of) const {
    std::nth_element(of.begin(), of.begin() + (C - 1), of.end(), std::greater<float>());
    return of[C - 1];
  }
};

// Rows of numbers, float or bfloat16.
struct Table {
  const void* numbers = nullptr;
  bool halves = false;
  int64_t rows = 0;

  // Row `id`; the first or last where there is none, as XLA's gather has it.
  void copy(int64_t id, int64_t D, float* to) const {
    id = std::clamp<int64_t>(id, 0, rows - 1);
    if (halves)
      for (int64_t d = 0; d < D; ++d) to[d] = static_cast<const Half*>(numbers)[id * D + d];
    else
      std::copy_n(static_cast<const float*>(numbers) + id * D, D, to);
  }
};

// Weights of one layer, its projections in groups that read one input: q,k,v; o; gate,up; down. And its cache.
struct Layer {
  const float *attention_scale = nullptr, *mlp_scale = nullptr, *q_scale = nullptr, *k_scale = nullptr;
  Group groups[4];
  float *keys = nullptr, *values = nullptr;
  int64_t kind = 0;  // which visibility it has
};

// All layers and the final norm, over R rows of each of B sequences: of `tokens`, and behind them `masks`.
struct Step {
  const int32_t* tokens = nullptr;
  Table embedding;
  const float *masks = nullptr, *cosine = nullptr, *sine = nullptr, *final_scale = nullptr;
  const int32_t *low = nullptr, *high = nullptr, *start = nullptr;
  const bool* seen = nullptr;
  float epsilon = 0;
  int64_t B = 0, R = 0, real = 0, D = 0, K = 0, S = 0, H = 0;
  int64_t masks_stride = 0;  // between sequences; 0 where they share one set
  std::vector<Layer> layers;
  float* latents = nullptr;  // what is computed

  void run(Team& team) const {
    int64_t rows = B * R;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t r = 0; r < real; ++r) embedding.copy(tokens[b * real + r], D, latents + (b * R + r) * D);
      std::copy_n(masks + b * masks_stride, (R - real) * D, latents + (b * R + real) * D);
    }
    thread_local std::vector<float> normed, projected, attended, gates, gated, own_keys, own_values;
    for (const Layer& layer : layers) {
      int64_t N = layer.groups[0].width() / H - 2 * K, F = layer.groups[2].width() / 2;
      normed.resize(rows * D), projected.resize(rows * (N + 2 * K) * H), attended.resize(rows * N * H);
      gates.resize(rows * 2 * F), gated.resize(rows * F);
      own_keys.resize(rows * K * H), own_values.resize(rows * K * H);

      Input x = normed_rows(team, latents, layer.attention_scale, normed.data(), layer.groups[0]);
      project(team, x, layer.groups[0], projected.data(), false);
      auto work = std::make_shared<Attention>();
      work->cosine = cosine, work->sine = sine;
      work->q_scale = layer.q_scale, work->k_scale = layer.k_scale, work->epsilon = epsilon;
      work->low = low + layer.kind * rows, work->high = high + layer.kind * rows;
      work->seen = seen + layer.kind * rows * R, work->start = start;
      work->projected = projected.data(), work->out = attended.data();
      work->keys = layer.keys, work->values = layer.values;
      work->own_keys = own_keys.data(), work->own_values = own_values.data();
      work->R = R, work->N = N, work->K = K, work->H = H, work->S = S, work->real = real;
      work->units = B * K;
      team.run(work);
      x = by_row(team, ByRow::What::NOTHING, attended.data(), nullptr, N * H, attended.data(), layer.groups[1].w.kind);
      project(team, x, layer.groups[1], latents, true);
      x = normed_rows(team, latents, layer.mlp_scale, normed.data(), layer.groups[2]);
      project(team, x, layer.groups[2], gates.data(), false);
      x = by_row(team, ByRow::What::GATE, gates.data(), nullptr, F, gated.data(), layer.groups[3].w.kind);
      project(team, x, layer.groups[3], latents, true);
    }
    by_row(team, ByRow::What::NORM, latents, final_scale, D, latents, Kind::FLOATS);
  }

 private:
  Input normed_rows(Team& team, const float* from, const float* scale, float* to, const Group& group) const {
    return by_row(team, ByRow::What::NORM, from, scale, D, to, group.w.kind);
  }

  // Rows as the matrices of a group of this kind take them; they last until the next ones.
  Input by_row(Team& team, ByRow::What what, const float* from, const float* scale, int64_t width, float* to,
               Kind kind) const {
    thread_local Roundings roundings;
    Rounded rounded = kind == Kind::FOURS ? roundings.of(B * R, width) : Rounded{};
    auto work = std::make_shared<ByRow>();
    work->what = what, work->x = from, work->scale = scale, work->y = to, work->epsilon = epsilon;
    work->D = width, work->rounded = rounded, work->units = B * R;
    if (what != ByRow::What::NOTHING || rounded.numbers) team.run(work);
    return {to, B * R, width, rounded};
  }

  void project(Team& team, Input x, const Group& group, float* to, bool add) const {
    thread_local std::vector<float> inner;
    auto work = std::make_shared<Products>();
    work->x = x, work->group = group, work->y = to, work->add = add, work->sequences = B;
    if (group.a.w && real < R) {
      work->lora_rows = R - real, work->C = group.a.ends.last();
      inner.resize(B * work->lora_rows * work->C);
      work->inner = inner.data();
    }
    work->prepare(team.threads);
    team.run(work);
  }
};

// A step without its real rows from number `used` on, whose latents are then zero: prompts are padded to few lengths, and
// most of the time that they take is spent on rows.
inline void run_without_padding(const Step& step, int64_t used, Team& team) {
  int64_t B = step.B, R = used + step.R - step.real, half = step.H / 2, kinds = 1;
  for (const Layer& layer : step.layers) kinds = std::max(kinds, layer.kind + 1);
  auto of = [&](int64_t r) { return r < used ? r : r - used + step.real; };  // the row that becomes row r
  std::vector<int32_t> tokens(B * used), low(kinds * B * R), high(kinds * B * R);
  std::vector<float> cosine(B * R * half), sine(B * R * half), latents(B * R * step.D);
  std::unique_ptr<bool[]> seen(new bool[kinds * B * R * R]);
  for (int64_t b = 0; b < B; ++b) {
    std::copy_n(step.tokens + b * step.real, used, &tokens[b * used]);
    for (int64_t r = 0; r < R; ++r) {
      std::copy_n(step.cosine + (b * step.R + of(r)) * half, half, &cosine[(b * R + r) * half]);
      std::copy_n(step.sine + (b * step.R + of(r)) * half, half, &sine[(b * R + r) * half]);
    }
  }
  for (int64_t s = 0; s < kinds * B; ++s)
    for (int64_t r = 0; r < R; ++r) {
      int64_t from = s * step.R + of(r), to = s * R + r;
      low[to] = step.low[from], high[to] = step.high[from];
      for (int64_t o = 0; o < R; ++o) seen[to * R + o] = step.seen[from * step.R + of(o)];
    }
  Step part = step;
  part.R = R, part.real = used, part.tokens = tokens.data(), part.latents = latents.data();
  part.cosine = cosine.data(), part.sine = sine.data();
  part.low = low.data(), part.high = high.data(), part.seen = seen.get();
  part.run(team);
  std::fill_n(step.latents, B * step.R * step.D, 0.0f);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t r = 0; r < R; ++r)
      std::copy_n(&latents[(b * R + r) * step.D], step.D, step.latents + (b * step.R + of(r)) * step.D);
}

}  // namespace mtp_jax
