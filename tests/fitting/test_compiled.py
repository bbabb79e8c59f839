"""What is read from a compiled program: collectives through loops and fusions; and the arithmetic of a traced one."""

import jax
import jax.numpy as jnp
import pytest

from mtp_jax.fitting.compiled import Collective, array_bytes, bytes_by_kind, collectives, computations, executed, flops

pytestmark = pytest.mark.quick

HLO = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%begin (p: bf16[64,512]) -> (bf16[64,512], bf16[256,512]) {
  %p = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[256,512]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[64,512]{1,0:T(8,128)S(1)}, bf16[256,512]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[64,512]) -> bf16[256,512] {
  %p.1 = bf16[64,512]{1,0} parameter(0)
  %gather.2 = bf16[256,512]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[256,512]{1,0} custom-call(%p.1, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (input: f32[1024]) -> f32[128] {
  %input = f32[1024]{0} parameter(0)
  %reduce = f32[1024]{0} all-reduce(%input), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[128]{0} dynamic-slice(%reduce, %offset), dynamic_slice_sizes={128}
}

%body (state: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {
  %state = (s32[], bf16[64,512]{1,0}) parameter(0)
  %f = (bf16[64,512]{1,0}, bf16[256,512]{1,0}, u32[]) fusion(%shard), kind=kCustom, calls=%begin
  %g = bf16[256,512]{1,0} fusion(%f), kind=kCustom, calls=%beside
  ROOT %next = (s32[], bf16[64,512]{1,0}) tuple(%i, %shard)
}

%cond (state: (s32[], bf16[64,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[64,512]) -> f32[] {
  %a = bf16[64,512]{1,0} parameter(0)
  %loop = (s32[], bf16[64,512]{1,0}) while(%init), condition=%cond, body=%body
  %scattered = f32[128]{0} fusion(%g.2), kind=kCustom, calls=%all-reduce-scatter.7
  %norm = (f32[], f32[10]{0}) all-reduce(%x.1, %x.2), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %alone = f32[100]{0} all-reduce(%x.3), replica_groups={{0},{1}}, to_apply=%add
  %there = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  ROOT %back = bf16[8]{0} collective-permute-done(%there)
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run():
    assert sorted(collectives(HLO), key=lambda c: c.kind) == [
        Collective("all-gather", 3, 4, 2 * 256 * 512),  # in a loop; begun in one fusion and ended in another
        Collective("all-reduce", 1, 2, 4 * 11),
        Collective("collective-permute", 1, 2, 16),
        Collective("reduce-scatter", 1, 8, 4096),
    ]


CONDITIONAL = """HloModule jit_step

%inner (p: f32[64]) -> f32[64] {
  %p.3 = f32[64]{0} parameter(0)
  ROOT %twice = f32[64]{0} add(%p.3, %p.3)
}

%large (p: f32[64]) -> f32[64] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %far = f32[64]{0} fusion(%p.1), kind=kLoop, calls=%inner
}

%small (p: f32[64]) -> f32[64] {
  %p.2 = f32[64]{0} parameter(0)
  ROOT %near = f32[8]{0} negate(%p.2)
}

ENTRY %main (a: f32[64], b: pred[]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %c = f32[64]{0} conditional(%b, %a, %a), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%large, %small}", "true_computation=%small, false_computation=%large"],
)
def test_of_a_conditional_the_smallest_branch_counts(branches):
    every, entry = computations(CONDITIONAL.replace("BRANCHES", branches))
    assert executed(every, entry) == {"main": 1, "small": 1}


def test_bytes_are_those_a_chip_receives():
    moved = bytes_by_kind(collectives(HLO))
    assert moved == {
        "all-gather": 3 * 2 * 256 * 512 * 3 // 4,
        "all-reduce": 44,  # twice half of it
        "collective-permute": 16,
        "reduce-scatter": 4096 * 7 // 8,
    }


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [("f32[]", [4]), ("(pred[3,2], bf16[5]{0:T(8)}, u4[6])", [6, 10, 3]), ("f8e4m3fn[7,1]", [7]), ("token[]", [1])],
)
def test_bytes_of_a_shape(shape, sizes):
    assert array_bytes(shape) == sizes


def test_arithmetic_is_counted_through_loops_and_recomputation():
    w = jnp.ones((8, 8))

    def loss(w):
        layer = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
        return jax.lax.scan(layer, jnp.ones((4, 8)), length=5)[0].sum()

    once = 2 * 4 * 8 * 8
    assert flops(jax.make_jaxpr(loss)(w).jaxpr) == 5 * once
    assert flops(jax.make_jaxpr(jax.grad(loss))(w).jaxpr) == 5 * 4 * once  # forward, again, and two products backward


def test_arithmetic_of_groups_and_branches():
    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([3, 2], jnp.int32))

    x, w = jnp.ones((6, 8)), jnp.ones((2, 8, 5))
    assert flops(jax.make_jaxpr(grouped)(x, w).jaxpr) == 2 * 6 * 8 * 5
    summed = jax.make_jaxpr(jax.grad(lambda *a: grouped(*a).sum(), argnums=(0, 1)))(x, w)
    assert flops(summed.jaxpr) == 3 * 2 * 6 * 8 * 5  # forward, and two products backward

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ jnp.ones((8, 2)), lambda x: (x @ jnp.ones((8, 9)))[:, :2], x)

    assert flops(jax.make_jaxpr(either)(x).jaxpr) == 2 * 6 * 8 * 2
