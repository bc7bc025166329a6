"""The roofline: kinds of kernels, and the larger of two times."""

import pytest

from jaxalign.aot import hlo, roofline
from jaxalign.aot.topology import Chip

CHIP = Chip(memory=2**30, bandwidth=1e3, flops=1e6)
TEXT = """\
%pointwise (p: f32[100]) -> f32[100] {
  %p = f32[100] parameter(0)
  ROOT %sine = f32[100] sine(%p)
}

%norm (p.1: f32[100]) -> f32[] {
  %p.1 = f32[100] parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[] reduce(%p.1, %zero), dimensions={0}, to_apply=%add
}

%moved (p.2: f32[100]) -> f32[100] {
  %p.2 = f32[100] parameter(0)
  ROOT %turned = f32[100] copy(%p.2)
}

%narrow (p.3: f32[100]) -> bf16[100] {
  %p.3 = f32[100] parameter(0)
  ROOT %cast = bf16[100] convert(%p.3)
}

ENTRY %main () -> f32[1] {
  %a = f32[100] parameter(0)
  %m = f32[64,64] parameter(1)
  %thin = f32[64,4] parameter(2)
  %q = f32[2,64,8,40] parameter(3)
  %e = f32[100] fusion(%a), calls=%pointwise
  %n = f32[] fusion(%a), calls=%norm
  %c = f32[100] fusion(%a), calls=%moved
  %k = bf16[100] fusion(%a), calls=%narrow
  %g = f32[64,64] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %t = f32[64,4] dot(%m, %thin), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %l = f32[64,64] custom-call(%m, %m), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  %f = f32[2,64,8,40] custom-call(%q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %r = f32[100] all-reduce-start(%a), replica_groups={}
  %d = f32[100] all-reduce-done(%r)
  ROOT %out = f32[1] bitcast(%a)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
  return hlo.Program(TEXT)


def test_kinds(program):
  found = {
    run.instruction.name: roofline.kind(program, run.instruction)
    for run in program.runs
    if roofline.is_kernel(run)
  }
  assert found == {
    "e": "elementwise",
    "n": "norms and sums",
    "c": "copies and slices",
    "k": "casts",
    "g": "product",
    "t": "product, thin",
    "l": "product",
    "f": "attention, fused",
    "r": "collective",
  }


def test_a_kernel_takes_the_larger_of_two_times(program):
  runs = {run.instruction.name: run for run in program.runs}
  moving = roofline.cost(program, runs["e"], CHIP)
  assert moving == roofline.Row(1, pytest.approx(800 / 1e3), 0, 800, 0)
  computing = roofline.cost(program, runs["g"], CHIP._replace(bandwidth=1e9))
  assert computing.seconds == pytest.approx(2 * 64**3 / 1e6)


def test_collectives_have_no_time_here(program):
  run = next(run for run in program.runs if run.instruction.name == "r")
  assert roofline.cost(program, run, CHIP).seconds == 0.0


def test_tables_are_sorted_and_add_up(program):
  table = roofline.by_kind(program, program.runs, CHIP)
  seconds = [row.seconds for row in table.values()]
  assert seconds == sorted(seconds, reverse=True)
  assert roofline.total(table).kernels == 9
  assert table["product"].kernels == 2


def test_cycles_are_xlas_own():
  text = """\
ENTRY %main () -> f32[1] {
  %a = f32[100] parameter(0)
  ROOT %e = f32[100] sine(%a), backend_config={"estimated_cycles":"123"}
}
"""
  program = hlo.Program(text)
  (run,) = [run for run in program.runs if roofline.is_kernel(run)]
  assert roofline.cost(program, run, CHIP).cycles == 123
