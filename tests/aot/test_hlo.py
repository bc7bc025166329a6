"""The reader of compiled programs, on texts short enough to count by hand and on XLA's own."""

import jax
import jax.numpy as jnp
import pytest

from jaxalign.aot import casts, flops, hlo, work

# A loop of five passes that casts a weight, multiplies by it, and hands it on.
LOOP = """\
HloModule jit_f, is_scheduled=true

%fused_cast (p.0: f32[64,32]) -> bf16[64,32] {
  %p.0 = f32[64,32]{1,0} parameter(0)
  ROOT %convert.1 = bf16[64,32]{1,0} convert(%p.0), metadata={op_name="jit(f)/while/body/cast"}
}

%body (carried: (s32[], bf16[8,64], f32[64,32])) -> (s32[], bf16[8,64], f32[64,32]) {
  %carried = (s32[], bf16[8,64]{1,0}, f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%carried), index=1
  %w = f32[64,32]{1,0} get-tuple-element(%carried), index=2
  %cast = bf16[64,32]{1,0} fusion(%w), kind=kLoop, calls=%fused_cast
  %y = bf16[8,32]{1,0} dot(%x, %cast), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = bf16[8,64]{1,0} custom-call(%y, %x), custom_call_target="mine"
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %result = (s32[], bf16[8,64]{1,0}, f32[64,32]{1,0}) tuple(%next, %z, %w)
}

%condition (carried.1: (s32[], bf16[8,64], f32[64,32])) -> pred[] {
  %carried.1 = (s32[], bf16[8,64]{1,0}, f32[64,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %last = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

ENTRY %main (x.0: bf16[8,64], w.0: f32[32,64]) -> bf16[8,64] {
  %x.0 = bf16[8,64]{1,0} parameter(0)
  %w.0 = f32[32,64]{1,0} parameter(1), metadata={op_name="params[\\'layer\\'][\\'kernel\\']"}
  %turned = f32[64,32]{1,0} transpose(%w.0), dimensions={1,0}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,64]{1,0}, f32[64,32]{1,0}) tuple(%zero, %x.0, %turned)
  %loop = (s32[], bf16[8,64]{1,0}, f32[64,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501 (XLA breaks no line)


def test_a_loop_is_counted_as_often_as_it_runs():
  program = hlo.Program(LOOP)
  times = {run.instruction.name: run.times for run in program.runs}
  assert (times["turned"], times["cast"], times["y"]) == (1, 5, 5)
  inner = next(run for run in program.runs if run.instruction.name == "y")
  assert [loop.name for loop in inner.loops] == ["loop"]
  operations = sum(run.times * work.operations(program, run.instruction) for run in program.runs)
  assert operations == 5 * 2 * 8 * 64 * 32


def test_a_loop_of_unknown_length_is_counted_as_the_caller_says():
  text = LOOP.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
  text = text.replace("%last = s32[] constant(5)", "%last = s32[] get-tuple-element(%carried.1)")
  assert {run.times for run in hlo.Program(text, unknown_trips=7).runs if run.loops} == {7}


def test_a_bound_in_the_condition_is_a_length_too():
  text = LOOP.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
  assert {run.times for run in hlo.Program(text, unknown_trips=7).runs if run.loops} == {5}


def test_traffic_is_what_is_read_and_written():
  program = hlo.Program(LOOP)
  by_name = {run.instruction.name: run.instruction for run in program.runs}
  assert work.traffic(program, by_name["cast"]) == 64 * 32 * (4 + 2)
  assert work.traffic(program, by_name["y"]) == 2 * (8 * 64 + 64 * 32 + 8 * 32)


def test_of_a_slice_only_the_slice_counts():
  text = """\
%fused (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  ROOT %twice = f32[1,8]{1,0} add(%row, %row)
}

ENTRY %main (a: f32[100,8], j: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[1,8]{1,0} fusion(%a, %j), kind=kLoop, calls=%fused
}
"""
  program = hlo.Program(text)
  fusion = program.runs[-1].instruction
  assert work.traffic(program, fusion) == 8 * 4 + 4 + 8 * 4  # the row, its number, the result


def test_a_weight_that_is_cast_in_a_loop_is_found():
  program = hlo.Program(LOOP)
  (found,) = casts.weight_casts(program)
  assert (found.times, found.from_dtype, found.to_dtype) == (5, "f32", "bf16")
  assert found.shape == (64, 32) and found.argument == "params['layer']['kernel']"


def test_data_is_no_weight():
  assert not casts.weight_casts(hlo.Program(LOOP.replace("kernel", "x_0")))


def test_a_weight_that_is_cast_before_the_loop_is_none():
  program = hlo.Program(LOOP.replace("f32", "bf16"))
  assert not casts.weight_casts(program)
  computed = LOOP.replace("transpose(%w.0), dimensions={1,0}", "custom-call(%w.0)")
  assert not casts.weight_casts(hlo.Program(computed))  # an argument no longer


def test_what_a_loop_carries_unchanged():
  program = hlo.Program(LOOP)
  (loop,) = casts.loops(program)
  assert casts.constant_bytes(program, loop) == 64 * 32 * 4
  changed = LOOP.replace("tuple(%next, %z, %w)", "tuple(%next, %z, %other)")
  assert casts.constant_bytes(hlo.Program(changed), casts.loops(hlo.Program(changed))[0]) == 0


@pytest.mark.parametrize("stride, size", [(1, 8), (2, 4)])
def test_cudnn_calls_are_counted_by_their_forward_convolution(stride, size):
  call = (
    "%y = (f32[{out}]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), "
    "window={{size=3x3 stride={stride}x{stride} pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, "
    'custom_call_target="__cudnn$conv{kind}"'
  )
  image, kernel, result = "2,8,8,3", "5,3,3,3", f"2,{size},{size},5"
  shapes = {
    "Forward": (image, kernel, result),
    "BackwardInput": (result, kernel, image),
    "BackwardFilter": (image, result, kernel),
  }
  for kind, (a, b, out) in shapes.items():
    body = [
      "ENTRY %main () -> f32[1] {",
      f"  %a = f32[{a}] parameter(0)",
      f"  %b = f32[{b}] parameter(1)",
      "  " + call.format(out=out, stride=stride, kind=kind),
      "}",
    ]
    program = hlo.Program("\n".join(body))
    assert work.operations(program, program.runs[-1].instruction) == 2 * (2 * size**2 * 5) * 27


def test_fused_attention_counts_its_products():
  text = """\
ENTRY %main () -> bf16[2] {
  %q = bf16[2,64,8,40] parameter(0)
  %k = bf16[2,16,8,40] parameter(1)
  %out = (bf16[2,8,64,40]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[2,8,64,40]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward"
}
"""  # noqa: E501
  program = hlo.Program(text)
  forward, backward = (work.operations(program, run.instruction) for run in program.runs[-2:])
  assert forward == 2 * 2 * (2 * 8 * 64 * 16 * 40)
  assert backward == 2.5 * forward  # the logits again, and two products for each of the two


def test_xlas_own_programs_are_counted_as_the_least_count():
  x, weights = jnp.ones((6, 16)), jnp.ones((3, 16, 16))

  def network(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

  text = jax.jit(network).lower(weights, x).compile().as_text()
  program = hlo.Program(text)
  counted = sum(run.times * work.operations(program, run.instruction) for run in program.runs)
  params = {"w": {"kernel": weights}}
  least = flops.minimum(lambda params, x: network(params["w"]["kernel"], x), params, x)
  assert counted == least.forward == 3 * 2 * 6 * 16 * 16


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="expected the text of a compiled program"):
    hlo.Program("nothing")
