"""Programs compiled for H100 that are not there: they compile, and hold what they should.

  pip install -e ".[aot-gpu,test]"
  python -m pytest -m "aot and not slow" tests/test_aot.py

Small models on eight devices in every layout; `-m "aot and slow"` compiles Stable Diffusion 1.5 at
full size for one device and for eight.
"""

import functools
import importlib.util

import jax
import pytest

from jaxalign.aot import reading, topology
from jaxalign.benchmarks import compiled_cases
from jaxalign.distributed import sharding

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra aot-gpu"
  ),
]

# Devices that share the weights, of eight.
LAYOUTS = {"data=8": 1, "fsdp=8": 8, "data=2 x fsdp=4": 4}
CASES = [
  "ddpo-rollout",
  *(f"{name}-update{form}" for name in ("ddpo", "dpo", "draft") for form in ("", "-full")),
]
STEPS, SLICES = 4, 2
SMALL_BYTES = 2**10  # collectives of less are counters, norms and metrics
SMALL_BATCH = 64  # images, so many that activations of all of them are larger than any weight
FULL_BATCH = 8  # images a device


class Found:
  """A case of a model on so many devices, compiled and read."""

  def __init__(self, model, name, count, fsdp):
    case = compiled_cases.CASES[f"{model}-{name}"]
    described = topology.find_devices(f"{count}xh100")
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=described.devices)
    changes = {"process.num_steps": STEPS}
    if model == "small" and case.method == "draft":  # beside which CLIP would be large
      changes["reward.names"] = ("device_jobs:soft_brightness",)
    with topology.answering_for(described):
      work = compiled_cases.make_work(case, compiled_cases.make_config(case, changes), mesh)
      batch = SMALL_BATCH if model == "small" else FULL_BATCH * count
      function, args, _ = compiled_cases.program(case, work, batch, SLICES)
    made = reading.compile_for(described, function, args)
    steps = STEPS if case.program == "rollout" else SLICES
    self.reading = reading.read(made.executable, described, mesh, steps=steps)
    weights = jax.tree.leaves((work.frozen["base"], work.state.params))
    self.largest_weight = max(leaf.size * leaf.dtype.itemsize for leaf in weights)
    self.devices = count


compiled = functools.cache(Found)


@pytest.fixture(autouse=True, scope="module")
def every_weight_is_cut():
  """The small model's too, which are below the size from which `fsdp` cuts."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "MIN_ELEMENTS", 2**10)
    yield


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def fsdp(request):
  return request.param


@pytest.mark.parametrize("case", CASES)
class TestSmall:
  """Of eight devices, in every layout."""

  def found(self, case, fsdp):
    return compiled("small", case, 8, fsdp)

  def test_attention_is_fused(self, case, fsdp):
    assert self.found(case, fsdp).reading.fused_attention > 0

  def test_no_collective_of_a_step_is_larger_than_the_largest_weight(self, case, fsdp):
    check_collectives(self.found(case, fsdp))

  def test_devices_share_the_work_of_one(self, case, fsdp):
    check_work(self.found(case, fsdp), compiled("small", case, 1, 1))

  def test_no_weight_is_cast_inside_a_loop(self, case, fsdp):
    check_casts(self.found(case, fsdp))

  def test_gradients_are_reduced_in_float32(self, case, fsdp):
    check_gradients(self.found(case, fsdp))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stable_diffusion_on_one(case):
  found = compiled("sd15", case, 1, 1)
  assert found.reading.fused_attention > 0
  assert found.reading.peak < topology.GPUS["h100"].memory
  check_casts(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stable_diffusion_on_eight(case, fsdp):
  found = compiled("sd15", case, 8, fsdp)
  assert found.reading.fused_attention > 0
  check_collectives(found)
  check_casts(found)
  check_gradients(found)


def check_collectives(found):
  larger = [one for one in found.reading.step_collectives if one.largest > found.largest_weight]
  assert not larger


def check_work(found, alone):
  done = found.reading.total.operations * found.devices
  assert done == pytest.approx(alone.reading.total.operations, rel=0.01)


def check_casts(found):
  assert not [cast.argument for cast in found.reading.weight_casts]


def check_gradients(found):
  reduced = [
    one
    for one in found.reading.collectives
    if one.kind in ("all-reduce", "reduce-scatter") and one.num_bytes >= SMALL_BYTES
  ]
  assert {dtype for one in reduced for dtype in one.dtypes} <= {"f32"}, reduced
