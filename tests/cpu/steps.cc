// Steps of odd shapes against a plain computation in double: what sanitizers watch. Prints "steps agree" and exits with 0.

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>

#include "step.h"

using namespace mtp_jax;

namespace {

std::mt19937 draw(0);

std::vector<float> normal(size_t count, float scale = 1) {
  std::normal_distribution<float> number(0, scale);
  std::vector<float> out(count);
  for (float& x : out) x = number(draw);
  return out;
}

// What a pointer of the step leads to, kept until the end.
struct Kept {
  std::deque<std::vector<float>> floats;
  std::deque<std::vector<uint16_t>> halves;
  std::deque<std::vector<uint8_t>> bytes;
  std::deque<std::vector<int64_t>> numbers;

  const float* hold(std::vector<float> x) { return floats.emplace_back(std::move(x)).data(); }
  Numbers hold(std::vector<int64_t> x) {
    numbers.push_back(std::move(x));
    return {numbers.back().data(), numbers.back().size()};
  }
} kept;

float rounded(float x) {  // to a bfloat16 number
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits &= 0xFFFF0000u;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// A matrix [K, N], of several side by side that end at `ends`, and its panels.
struct Matrix {
  int64_t K, N;
  std::vector<float> w;
  Panels panels;

  Matrix(int64_t K, std::vector<int64_t> ends, Kind kind) : K(K), N(ends.back()), w(normal(K * N, 1 / std::sqrt(K))) {
    bool halves = kind == Kind::HALVES, fours = kind == Kind::FOURS;
    int64_t rows = fours ? Rounded::width(K) : K;
    panels.kind = kind;
    if (halves)
      for (float& x : w) x = rounded(x);
    std::vector<float> scale = normal(N, 1 / (60 * std::sqrt(float(K))));
    if (panels.whole())  // and a scale for each column
      for (int64_t i = 0; i < K * N; ++i) w[i] = std::round(std::clamp(w[i] * 60 * std::sqrt(float(K)), -127.f, 127.f));
    int64_t count = 0, begin = 0;
    for (int64_t end : ends) count += (end - begin + WIDTH - 1) / WIDTH, begin = end;
    std::vector<float> filled(count * rows * WIDTH, 0);
    panels = {nullptr, kind, rows, count, kept.hold(ends)};
    for (int64_t p = 0; p < count; ++p) {
      Panels::Place at = panels.place(p);
      for (int64_t k = 0; k < K; ++k)
        for (int64_t n = 0; n < at.width; ++n) {
          int64_t place = k * WIDTH + (halves ? (n % LANES) * 2 + n / LANES : n);  // in pairs
          if (fours) place = k / 4 * 4 * WIDTH + 4 * n + k % 4;
          filled[p * rows * WIDTH + place] = w[k * N + at.column + n];
        }
    }
    if (halves) {
      auto& packed = kept.halves.emplace_back(filled.size());
      for (size_t i = 0; i < filled.size(); ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, &filled[i], sizeof bits);
        packed[i] = static_cast<uint16_t>(bits >> 16);
      }
      panels.w = packed.data();
    } else if (panels.whole()) {
      auto& packed = kept.bytes.emplace_back(filled.size());
      for (size_t i = 0; i < filled.size(); ++i) packed[i] = static_cast<int>(filled[i]) + (fours ? 128 : 0);
      panels.w = packed.data();
      for (int64_t i = 0; i < K * N; ++i) w[i] *= scale[i % N];
      panels.scale = kept.hold(std::move(scale));
    } else {
      panels.w = kept.hold(std::move(filled));
    }
  }

  // x, or as whole numbers with a scale for each block of them.
  std::vector<double> given(const double* x) const {
    std::vector<double> out(x, x + K);
    for (int64_t from = 0; panels.kind == Kind::FOURS && from < K; from += BLOCK) {
      double most = 0;
      for (int64_t k = from; k < std::min(K, from + BLOCK); ++k) most = std::max(most, std::abs(x[k]));
      for (int64_t k = from; most > 0 && k < std::min(K, from + BLOCK); ++k)
        out[k] = std::nearbyint(x[k] * 127 / most) * most / 127;
    }
    return out;
  }

  std::vector<double> times(const double* x) const {
    std::vector<double> y(N, 0), rows = given(x);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < N; ++n) y[n] += rows[k] * w[k * N + n];
    return y;
  }
};

// A group of projections: their matrices, a bias, and a LoRA of rank `rank` that all of them read in part.
struct Weights {
  Matrix w;
  std::vector<float> bias;
  std::vector<Matrix> lora;  // a and b, or nothing
  int64_t rank;
  Group group;

  Weights(int64_t K, std::vector<int64_t> ends, Kind kind, bool with_bias, int64_t rank)
      : w(K, ends, kind), bias(with_bias ? normal(ends.back()) : std::vector<float>()), rank(rank) {
    group.w = w.panels;
    if (with_bias) group.bias = bias.data();
    if (!rank) return;
    int64_t parts = static_cast<int64_t>(ends.size());
    Kind of_lora = kind == Kind::BYTES ? Kind::FLOATS : kind;
    lora.emplace_back(K, std::vector<int64_t>{rank * parts}, of_lora);
    lora.emplace_back(rank, ends, of_lora == Kind::FOURS ? Kind::BYTES : of_lora);
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < parts; ++i) offsets.push_back(i * rank);
    group.a = lora[0].panels, group.b = lora[1].panels, group.offsets = kept.hold(offsets);
  }

  std::vector<double> times(const double* x, bool adapted) const {
    std::vector<double> y = w.times(x);
    for (size_t n = 0; n < bias.size(); ++n) y[n] += bias[n];
    if (!adapted || !rank) return y;
    std::vector<double> inner = lora[0].times(x);
    int64_t begin = 0;
    for (size_t part = 0; part < group.w.ends.size(); begin = group.w.ends[part++])
      for (int64_t n = begin; n < group.w.ends[part]; ++n)
        for (int64_t r = 0; r < rank; ++r) y[n] += inner[part * rank + r] * lora[1].w[r * lora[1].N + n];
    return y;
  }
};

std::vector<double> normed(const double* x, int64_t D, const float* scale, double epsilon) {
  double square = 0;
  for (int64_t d = 0; d < D; ++d) square += x[d] * x[d];
  std::vector<double> y(D);
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] / std::sqrt(square / D + epsilon) * scale[d];
  return y;
}

struct Shape {
  int64_t B, real, masks, D, N, K, H, F, S;
  Kind kind;
  bool biases, head_norms;
  int64_t rank;
};

void check(const Shape& s, Team& team) {
  constexpr double EPSILON = 1e-3;
  constexpr int LAYERS = 2, V = 37;
  int64_t R = s.real + s.masks, rows = s.B * R;
  std::vector<float> table = normal(V * s.D), masks = normal(s.masks * s.D), final_scale = normal(s.D);
  std::vector<float> cosine = normal(rows * s.H / 2), sine = normal(rows * s.H / 2), latents(rows * s.D);
  std::vector<int32_t> tokens(s.B * s.real), low(rows), high(rows), start(s.B);
  std::unique_ptr<bool[]> seen(new bool[rows * R]);
  for (int32_t& token : tokens) token = draw() % V;
  for (int64_t b = 0; b < s.B; ++b) {
    start[b] = static_cast<int32_t>(draw() % (s.S - s.real));
    for (int64_t r = 0; r < R; ++r) {
      low[b * R + r] = static_cast<int32_t>(draw() % 3), high[b * R + r] = start[b];
      for (int64_t o = 0; o < R; ++o) seen[(b * R + r) * R + o] = o == r || (o < r && o != s.real - 1 && draw() % 2);
    }
  }
  std::deque<Weights> weights;
  std::deque<std::vector<float>> scales, caches;
  Step step;
  step.tokens = tokens.data(), step.embedding = {table.data(), false, V}, step.masks = masks.data();
  step.cosine = cosine.data(), step.sine = sine.data(), step.final_scale = final_scale.data();
  step.low = low.data(), step.high = high.data(), step.start = start.data(), step.seen = seen.get();
  step.epsilon = EPSILON, step.B = s.B, step.R = R, step.real = s.real, step.D = s.D;
  step.K = s.K, step.S = s.S, step.H = s.H, step.latents = latents.data();
  int64_t q = s.N * s.H, k = s.K * s.H;
  for (int l = 0; l < LAYERS; ++l) {
    Layer layer;
    auto scale = [&](int64_t width) { return scales.emplace_back(normal(width)).data(); };
    layer.attention_scale = scale(s.D), layer.mlp_scale = scale(s.D);
    if (s.head_norms) layer.q_scale = scale(s.H), layer.k_scale = scale(s.H);
    layer.groups[0] = weights.emplace_back(s.D, std::vector<int64_t>{q, q + k, q + 2 * k}, s.kind, s.biases, s.rank).group;
    layer.groups[1] = weights.emplace_back(q, std::vector<int64_t>{s.D}, s.kind, false, s.rank).group;
    layer.groups[2] = weights.emplace_back(s.D, std::vector<int64_t>{s.F, 2 * s.F}, s.kind, s.biases, 0).group;
    layer.groups[3] = weights.emplace_back(s.F, std::vector<int64_t>{s.D}, s.kind, s.biases, s.rank).group;
    layer.keys = caches.emplace_back(normal(s.B * s.K * s.S * s.H)).data();
    layer.values = caches.emplace_back(normal(s.B * s.K * s.S * s.H)).data();
    step.layers.push_back(layer);
  }
  std::deque<std::vector<float>> before = caches;
  step.run(team);
  if (s.real > 1) {  // no other row sees the last real one: without it real rows are the same, sums of masks run otherwise
    std::vector<float> whole = latents;
    std::deque<std::vector<float>> after = caches;
    for (size_t i = 0; i < caches.size(); ++i) std::copy(before[i].begin(), before[i].end(), caches[i].begin());
    run_without_padding(step, s.real - 1, team);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < s.D; ++d) {
        float found = latents[row * s.D + d], same = row % R == s.real - 1 ? 0 : whole[row * s.D + d];
        float near = row % R < s.real ? 0 : s.kind == Kind::FOURS ? 5e-2f : 2e-3f;
        if (!(std::abs(found - same) <= near * (1 + std::abs(same)))) std::exit(1);
      }
    latents = whole;
    for (size_t i = 0; i < caches.size(); ++i) std::copy(after[i].begin(), after[i].end(), caches[i].begin());
  }

  std::vector<std::vector<double>> x(rows);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t r = 0; r < R; ++r) {
      const float* from = r < s.real ? &table[tokens[b * s.real + r] * s.D] : &masks[(r - s.real) * s.D];
      x[b * R + r].assign(from, from + s.D);
    }
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = step.layers[l];
    std::vector<std::vector<double>> heads(rows);
    for (int64_t row = 0; row < rows; ++row) {
      bool adapted = row % R >= s.real;
      heads[row] = weights[4 * l].times(normed(x[row].data(), s.D, layer.attention_scale, EPSILON).data(), adapted);
      for (int64_t head = 0; head < s.N + s.K; ++head) {
        double* h = &heads[row][head * s.H];
        const float* scale = head < s.N ? layer.q_scale : layer.k_scale;
        if (scale) {
          std::vector<double> y = normed(h, s.H, scale, EPSILON);
          std::copy(y.begin(), y.end(), h);
        }
        for (int64_t i = 0; i < s.H / 2; ++i) {
          double c = cosine[row * s.H / 2 + i], w = sine[row * s.H / 2 + i], a = h[i], b = h[i + s.H / 2];
          h[i] = a * c - b * w, h[i + s.H / 2] = b * c + a * w;
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      int64_t b = row / R;
      std::vector<double> out(q, 0);
      for (int64_t head = 0; head < s.N; ++head) {
        int64_t group = head / (s.N / s.K);
        std::vector<double> share;
        std::vector<std::function<double(int64_t)>> values;
        auto add = [&](auto key, auto value) {
          double score = 0;
          for (int64_t h = 0; h < s.H; ++h) score += heads[row][head * s.H + h] * key(h);
          share.push_back(std::exp(score / std::sqrt(static_cast<double>(s.H))));
          values.push_back(value);
        };
        for (int64_t slot = low[row]; slot < high[row]; ++slot) {
          int64_t at = ((b * s.K + group) * s.S + slot) * s.H;
          add([&, at](int64_t h) { return before[2 * l][at + h]; }, [&, at](int64_t h) { return before[2 * l + 1][at + h]; });
        }
        for (int64_t o = 0; o < R; ++o) {
          const std::vector<double>& other = heads[b * R + o];
          if (seen[row * R + o])
            add([&, group](int64_t h) { return other[q + group * s.H + h]; },
                [&, group](int64_t h) { return other[q + k + group * s.H + h]; });
        }
        double total = 0;
        for (double e : share) total += e;
        for (size_t i = 0; i < share.size(); ++i)
          for (int64_t h = 0; h < s.H; ++h) out[head * s.H + h] += share[i] / total * values[i](h);
      }
      bool adapted = row % R >= s.real;
      std::vector<double> y = weights[4 * l + 1].times(out.data(), adapted);
      for (int64_t d = 0; d < s.D; ++d) x[row][d] += y[d];
      std::vector<double> gates = weights[4 * l + 2].times(normed(x[row].data(), s.D, layer.mlp_scale, EPSILON).data(), adapted);
      std::vector<double> gated(s.F);
      for (int64_t f = 0; f < s.F; ++f) gated[f] = gates[f] / (1 + std::exp(-gates[f])) * gates[s.F + f];
      y = weights[4 * l + 3].times(gated.data(), adapted);
      for (int64_t d = 0; d < s.D; ++d) x[row][d] += y[d];
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> y = normed(x[row].data(), s.D, final_scale.data(), EPSILON);
    for (int64_t d = 0; d < s.D; ++d)
      // A number half way between two whole ones may become either.
      if (!(std::abs(y[d] - latents[row * s.D + d]) < (s.kind == Kind::FOURS ? 5e-2 : 2e-3) * (1 + std::abs(y[d])))) {
        std::fprintf(stderr, "row %d, number %d: %g, should be %g\n", int(row), int(d), latents[row * s.D + d], y[d]);
        std::exit(1);
      }
  }
}

void check_largest(int64_t rows, int64_t V, int64_t C, Team& team) {
  std::vector<float> x = normal(rows * V);
  std::vector<int32_t> found(rows * C);
  auto work = std::make_shared<Largest>();
  work->x = x.data(), work->y = found.data(), work->V = V, work->C = C, work->units = rows;
  team.run(work);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> sorted(x.begin() + row * V, x.begin() + (row + 1) * V);
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    for (int64_t c = 0; c < C; ++c)
      if (x[row * V + found[row * C + c]] < sorted[C - 1]) std::exit(1);
  }
}

}  // namespace

int main() {
  static Team* team = new Team(3);  // its threads outlive main
  //          B real masks D   N  K  H   F   S   numbers biases norms rank
  for (Shape shape : {Shape{1, 1, 0, 40, 4, 2, 16, 37, 20, Kind::FLOATS, false, false, 0},
                      Shape{2, 3, 5, 40, 4, 2, 16, 37, 20, Kind::FLOATS, true, true, 8},
                      Shape{1, 5, 20, 64, 8, 1, 10, 70, 33, Kind::HALVES, false, false, 3},
                      Shape{3, 2, 2, 33, 3, 3, 6, 50, 9, Kind::HALVES, true, false, 1},
                      Shape{1, 16, 0, 96, 64, 1, 8, 128, 40, Kind::HALVES, false, true, 0},
                      Shape{2, 3, 5, 40, 4, 2, 16, 37, 20, Kind::BYTES, true, true, 8},
                      Shape{1, 16, 0, 33, 3, 3, 6, 50, 40, Kind::BYTES, false, false, 0},
                      Shape{2, 3, 5, 40, 4, 2, 16, 37, 20, Kind::FOURS, true, true, 8},
                      Shape{1, 5, 20, 64, 8, 1, 10, 70, 33, Kind::FOURS, false, false, 4}})
    for (int again = 0; again < 20 && (ROUNDS || shape.kind != Kind::FOURS); ++again) check(shape, *team);
  for (int again = 0; again < 20; ++again) {
    check_largest(5, 1000, 256, *team);
    check_largest(1, 40, 1, *team);
    check_largest(5, 1000, 1, *team);
    check_largest(7, 300, 300, *team);
  }
  std::puts("steps agree");
}
