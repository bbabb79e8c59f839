// The arithmetic as custom calls of XLA programs: buffers in, buffers out. All layers of a step are one call, as what lies
// between two calls takes XLA longer than memory takes to give a small matrix.

#include <string>

#include "step.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Span = ffi::Span<const int64_t>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Heads = ffi::Buffer<ffi::F32, 4>;
using Ints = ffi::Buffer<ffi::S32, 1>;
using Ids = ffi::Buffer<ffi::S32, 2>;
using Bounds = ffi::Buffer<ffi::S32, 3>;
using Marks = ffi::Buffer<ffi::PRED, 4>;

namespace {

mtp_jax::Team& team(ffi::ThreadPool& pool) {
  static auto* team = new mtp_jax::Team(pool.num_threads() - 1);  // never destroyed: its threads outlive main
  return *team;
}

mtp_jax::Numbers numbers(Span of) { return {of.begin(), of.size()}; }

bool halves(const ffi::AnyBuffer& of) { return of.element_type() != ffi::F32; }

mtp_jax::Panels panels_of(const ffi::AnyBuffer& w, mtp_jax::Numbers ends) {
  using mtp_jax::Kind;
  auto type = w.element_type();
  bool fours = type == ffi::U8;  // [P, K / 4, W, 4]
  Kind kind = fours ? Kind::FOURS : type == ffi::S8 ? Kind::BYTES : halves(w) ? Kind::HALVES : Kind::FLOATS;
  return {w.untyped_data(), kind, w.dimensions()[1] * (fours ? 4 : 1), w.dimensions()[0], ends};
}

ffi::Error Product(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer w, ffi::Result<Matrix> y, Span ends) {
  auto work = std::make_shared<mtp_jax::Products>();
  work->x = {x.typed_data(), x.dimensions()[0], x.dimensions()[1]};
  work->group.w = panels_of(w, numbers(ends));
  thread_local mtp_jax::Roundings roundings;
  if (work->group.w.kind == mtp_jax::Kind::FOURS) {
    mtp_jax::Rounded to = work->x.rounded = roundings.of(work->x.rows, work->x.stride);
    for (int64_t row = 0; row < work->x.rows; ++row)
      mtp_jax::round_row(work->x.x + row * work->x.stride, work->x.stride, to.row(row, work->x.stride));
  }
  work->y = y->typed_data();
  work->prepare(team(pool).threads);
  team(pool).run(work);
  return ffi::Error::Success();
}

// `args` are for each layer its norms' scales; for each group its panels, bias, a and b, each with its scales where its
// numbers are whole; and the cache's keys and values, which `rets` alias.
ffi::Error Layers(ffi::ThreadPool pool, Ids tokens, ffi::AnyBuffer embedding, Matrix masks, Heads cosine, Heads sine,
                  Bounds low, Bounds high, Marks seen, Ints start, Ints used, Vector final_scale,
                  ffi::RemainingArgs args, ffi::Result<Rows> latents, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  auto attribute = [&](const std::string& name) { return numbers(*attrs.get<Span>(name)); };
  mtp_jax::Numbers kinds = attribute("kinds"), with_bias = attribute("with_bias");
  bool head_norms = *attrs.get<int64_t>("head_norms");
  size_t next = 0;
  auto any = [&] { return *args.get<ffi::AnyBuffer>(next++); };
  auto floats = [&]() -> const float* { return any().typed_data<float>(); };
  auto panels = [&](const std::string& ends) {
    mtp_jax::Panels of = panels_of(any(), attribute(ends));
    if (of.whole()) of.scale = floats();
    return of;
  };

  mtp_jax::Step step;
  step.tokens = tokens.typed_data();
  step.embedding = {embedding.untyped_data(), halves(embedding), embedding.dimensions()[0]};
  step.masks = masks.typed_data(), step.cosine = cosine.typed_data(), step.sine = sine.typed_data();
  step.final_scale = final_scale.typed_data(), step.low = low.typed_data(), step.high = high.typed_data();
  step.start = start.typed_data(), step.seen = seen.typed_data(), step.epsilon = *attrs.get<float>("epsilon");
  step.B = latents->dimensions()[0], step.R = latents->dimensions()[1], step.D = latents->dimensions()[2];
  step.real = tokens.dimensions()[1], step.latents = latents->typed_data();
  int64_t masks_of_one = (step.R - step.real) * step.D;
  if (static_cast<int64_t>(masks.element_count()) > masks_of_one) step.masks_stride = masks_of_one;
  for (size_t i = 0; i < kinds.size(); ++i) {
    mtp_jax::Layer layer;
    layer.kind = kinds[i];
    layer.attention_scale = floats(), layer.mlp_scale = floats();
    if (head_norms) layer.q_scale = floats(), layer.k_scale = floats();
    for (size_t j = 0; j < 4; ++j) {
      mtp_jax::Group& group = layer.groups[j];
      std::string number = std::to_string(j);
      group.w = panels("ends" + number);
      if (with_bias[j]) group.bias = floats();
      if (attribute("inner_ends" + number).size()) {
        group.a = panels("inner_ends" + number), group.b = panels("ends" + number);
        group.offsets = attribute("offsets" + number);
      }
    }
    next += 2;  // the cache, read and written through what aliases it
    auto keys = **rets.get<ffi::AnyBuffer>(2 * i), values = **rets.get<ffi::AnyBuffer>(2 * i + 1);
    layer.keys = keys.typed_data<float>(), layer.values = values.typed_data<float>();
    step.K = keys.dimensions()[1], step.S = keys.dimensions()[2], step.H = keys.dimensions()[3];
    step.layers.push_back(layer);
  }
  int64_t rows = std::clamp<int64_t>(used.typed_data()[0], 1, step.real);
  if (rows < step.real)
    mtp_jax::run_without_padding(step, rows, team(pool));
  else
    step.run(team(pool));
  return ffi::Error::Success();
}

ffi::Error Largest(ffi::ThreadPool pool, Matrix x, ffi::Result<Ids> y) {
  auto work = std::make_shared<mtp_jax::Largest>();
  work->x = x.typed_data(), work->y = y->typed_data();
  work->V = x.dimensions()[1], work->C = y->dimensions()[1];
  work->units = x.dimensions()[0];
  team(pool).run(work);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int mtp_jax_panel_width() { return mtp_jax::WIDTH; }

extern "C" bool mtp_jax_rounds() { return mtp_jax::ROUNDS; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_product, Product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>().Attr<Span>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_layers, Layers,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Ids>().Arg<ffi::AnyBuffer>().Arg<Matrix>().Arg<Heads>().Arg<Heads>()
        .Arg<Bounds>().Arg<Bounds>().Arg<Marks>().Arg<Ints>().Arg<Ints>().Arg<Vector>().RemainingArgs().Ret<Rows>().RemainingRets()
        .Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_largest, Largest,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Ids>());
