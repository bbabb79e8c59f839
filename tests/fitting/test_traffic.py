"""Bytes that programs move, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from mtp_jax.fitting.traffic import traffic

pytestmark = pytest.mark.quick

# A loop of 7 steps over weights [7, 256, 256] of 2 bytes, as compilers write it.
LOOP = """\
HloModule jit_f

%sliced (param_0: bf16[7,256,256], param_1: s32[], param_2: bf16[64,256]) -> f32[64,256] {
  %param_0 = bf16[7,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,256,256]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,256,256}
  %flat = bf16[256,256]{1,0} bitcast(%slice.1)
  %param_2 = bf16[64,256]{1,0} parameter(2)
  ROOT %dot.1 = f32[64,256]{1,0} convolution(%param_2, %flat), dim_labels=bf_io->bf
}

%written (param_0.1: f32[7,64,256], param_1.1: f32[64,256], param_2.1: s32[]) -> f32[7,64,256] {
  %param_0.1 = f32[7,64,256]{2,1,0} parameter(0)
  %param_1.1 = f32[64,256]{1,0} parameter(1)
  %wide = f32[1,64,256]{2,1,0} bitcast(%param_1.1)
  %param_2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[7,64,256]{2,1,0} dynamic-update-slice(%param_0.1, %wide, %param_2.1, %zero.1, %zero.1)
}

%body (arg: (s32[], bf16[7,256,256], bf16[64,256], f32[7,64,256])) -> (s32[], bf16[7,256,256], bf16[64,256], f32[7,64,256]) {
  %arg = (s32[], bf16[7,256,256]{2,1,0}, bf16[64,256]{1,0}, f32[7,64,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %weights = bf16[7,256,256]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[64,256]{1,0} get-tuple-element(%arg), index=2
  %kept = f32[7,64,256]{2,1,0} get-tuple-element(%arg), index=3
  %product = f32[64,256]{1,0} fusion(%weights, %i, %x), kind=kOutput, calls=%sliced, metadata={op_name="jit(f)/while/body/transpose(attention)/dot_general"}
  %near = f32[64,256]{1,0:T(8,128)S(1)} copy(%product), metadata={op_name="jit(f)/mlp/copy"}
  %store = f32[7,64,256]{2,1,0} fusion(%kept, %near, %i), kind=kLoop, calls=%written
  ROOT %out = (s32[], bf16[7,256,256]{2,1,0}, bf16[64,256]{1,0}, f32[7,64,256]{2,1,0}) tuple(%i, %weights, %x, %store)
}

%condition (arg.1: (s32[], bf16[7,256,256], bf16[64,256], f32[7,64,256])) -> pred[] {
  %arg.1 = (s32[], bf16[7,256,256]{2,1,0}, bf16[64,256]{1,0}, f32[7,64,256]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (w: bf16[7,256,256], x.1: bf16[64,256]) -> f32[7,64,256] {
  %w = bf16[7,256,256]{2,1,0} parameter(0)
  %x.1 = bf16[64,256]{1,0} parameter(1)
  %zero.2 = s32[] constant(0)
  %none = f32[7,64,256]{2,1,0} broadcast(%zero.2), dimensions={}
  %start = (bf16[64,256]{1,0:S(1)}, bf16[64,256]{1,0}, u32[]) copy-start(%x.1)
  %done = bf16[64,256]{1,0:S(1)} copy-done(%start)
  %all = (s32[], bf16[7,256,256]{2,1,0}, bf16[64,256]{1,0}, f32[7,64,256]{2,1,0}) tuple(%zero.2, %w, %x.1, %none)
  %loop = (s32[], bf16[7,256,256]{2,1,0}, bf16[64,256]{1,0}, f32[7,64,256]{2,1,0}) while(%all), condition=%condition, body=%body
  ROOT %result = f32[7,64,256]{2,1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501
ROWS, WEIGHTS = 64 * 256, 256 * 256


def test_loops_slices_updates_and_what_stays_on_the_chip():
    found = traffic(LOOP, ("attention", "mlp"))
    product = 7 * (2 * WEIGHTS + 4 + 2 * ROWS + 4 * ROWS)  # one slice, the counter, the rows; float32 out
    copied = 7 * 4 * ROWS  # read from memory, written on the chip
    stored = 7 * (2 * 4 * ROWS + 4)  # the update is read on the chip, but in place it is written, and counted twice
    begun = 4 * 7 * ROWS + 4
    start = 2 * ROWS + 4
    assert found["attention"] == product and found["mlp"] == copied
    assert found["all"] == found["attention"] + found["mlp"] + found["other"]
    assert found["other"] == stored + begun + start
    assert traffic(LOOP, ("attention/mlp", "body/attention"))["body/attention"] == product  # one scope in another


def test_a_compiled_program_moves_what_it_must():
    L, D, R = 5, 256, 64

    def f(x, weights):
        def layer(x, w):
            with jax.named_scope("mlp"):
                return x @ w, None

        return jax.lax.scan(layer, x, weights)[0]

    compiled = jax.jit(f).lower(jnp.ones((R, D)), jnp.ones((L, D, D))).compile()
    found = traffic(compiled.as_text(), ("mlp",))
    least = L * 4 * (D * D + 2 * R * D)
    assert least <= found["mlp"] <= 1.01 * least and found["all"] <= 3.2 * least  # the slice may be copied first


# A weight that is fetched to the chip in two halves beside other work, as libtpu writes it.
FETCHED = """\
HloModule jit_f

%half.1 (param_0: bf16[512,256]) -> bf16[256,256] {
  %param_0 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} slice(%param_0), slice={[0:256], [0:256]}
}

%half.2 (param_0.2: bf16[512,256]) -> bf16[256,256] {
  %param_0.2 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.2 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} slice(%param_0.2), slice={[256:512], [0:256]}
}

ENTRY %main (w: bf16[512,256], x: f32[256]) -> f32[256] {
  %w = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[256]{0} parameter(1)
  %start.1 = ((bf16[512,256]{1,0}), bf16[256,256]{1,0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%half.1
  %start.2 = ((bf16[512,256]{1,0}), bf16[256,256]{1,0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%half.2
  %done.1 = bf16[256,256]{1,0:S(1)} async-done(%start.1)
  %done.2 = bf16[256,256]{1,0:S(1)} async-done(%start.2)
  ROOT %sum = f32[256]{0} custom-call(%done.1, %done.2, %x)
}
"""


def test_what_is_fetched_in_parts_is_read_once():
    assert traffic(FETCHED)["all"] == 2 * 512 * 256 + 4 * 256 + 4 * 256


# A gather that begins, goes on beside a product, and ends.
FLYING = """\
HloModule jit_f

%begin (p: bf16[64,512]) -> (bf16[64,512], bf16[256,512]) {
  %p = bf16[64,512]{1,0} parameter(0)
  %gather.1 = bf16[256,512]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[64,512]{1,0:T(8,128)S(1)}, bf16[256,512]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[64,512], p.2: bf16[256,512], x: f32[8,8]) -> (f32[8,8], bf16[64,512], bf16[256,512]) {
  %x = f32[8,8]{1,0} parameter(2)
  %product = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %p.1 = bf16[64,512]{1,0} parameter(0)
  %p.2 = bf16[256,512]{1,0} parameter(1)
  %gather.2 = bf16[256,512]{1,0} all-gather(%p.1), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %next = (f32[8,8]{1,0}, bf16[64,512]{1,0}, bf16[256,512]{1,0}) tuple(%product, %p.1, %gather.2)
}

%end (p.3: bf16[64,512]) -> bf16[256,512] {
  %p.3 = bf16[64,512]{1,0} parameter(0)
  %gather.3 = bf16[256,512]{1,0} all-gather(%p.3), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[256,512]{1,0} custom-call(%p.3, %gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[64,512], b: f32[8,8]) -> bf16[256,512] {
  %a = bf16[64,512]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %f = (bf16[64,512]{1,0:T(8,128)S(1)}, bf16[256,512]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %f.1 = bf16[64,512]{1,0} get-tuple-element(%f), index=0
  %f.2 = bf16[256,512]{1,0} get-tuple-element(%f), index=1
  %g = (f32[8,8]{1,0}, bf16[64,512]{1,0}, bf16[256,512]{1,0}) fusion(%f.1, %f.2, %b), kind=kOutput, calls=%beside
  %g.1 = bf16[64,512]{1,0} get-tuple-element(%g), index=1
  ROOT %h = bf16[256,512]{1,0} fusion(%g.1), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_collective_beside_products_counts_where_it_begins():
    gather, product = 2 * 512 * (64 + 256), 2 * 4 * 64
    assert traffic(FLYING)["all"] == gather + product


GATHERED = """\
HloModule jit_f

%rows (p: bf16[4096,512], i: s32[64]) -> bf16[64,512] {
  %p = bf16[4096,512]{1,0} parameter(0)
  %i = s32[64]{0} parameter(1)
  ROOT %g = bf16[64,512]{1,0} gather(%p, %i), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,512}
}

%beside (p.1: bf16[4096,512], i.1: s32[64]) -> bf16[64,512] {
  %p.1 = bf16[4096,512]{1,0} parameter(0)
  %i.1 = s32[64]{0} parameter(1)
  ROOT %c = bf16[64,512]{1,0} custom-call(%p.1, %i.1), custom_call_target="Beside", called_computations={%rows}
}

ENTRY %main (a: bf16[4096,512], b: s32[64]) -> bf16[64,512] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %b = s32[64]{0} parameter(1)
  %s = ((bf16[4096,512], s32[64]), bf16[64,512], u32[]) async-start(%a, %b), calls=%beside
  ROOT %d = bf16[64,512]{1,0} async-done(%s)
}
"""


def test_rows_that_are_gathered_beside_products_count_once():
    assert traffic(GATHERED)["all"] == 2 * 2 * 64 * 512
