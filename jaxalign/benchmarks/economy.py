"""`hlo-economy`: the work in each compiled program over the least that it could be.

A gradient of frozen weights, a merged adapter, a network evaluated twice: none of them changes a
result, and all of them show here, on any machine and to the last digit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.aot import flops
from jaxalign.benchmarks import models, workload
from jaxalign.diffusion import guidance
from jaxalign.models.families import stable_diffusion
from jaxalign.training import least_work
from jaxalign.training.batching import Selection
from jaxalign.training.feeds import online

BATCH = 4  # images, pairs or prompts of a program


class Row(NamedTuple):
  """A program; products in operations, as `flops` counts them.

  temporary: bytes beside arguments and results.
  """

  program: str
  compiled: float
  minimum: float
  temporary: int

  @property
  def ratio(self) -> float:
    return self.compiled / self.minimum


def rows(model_name: str = "small") -> list[Row]:
  """Every program of DDPO, DPO and DRaFT, with an adapter and with all weights trained."""
  found = []
  for variant in ("lora", "full"):
    found += ddpo(model_name, variant)
    found += dpo(model_name, variant)
    found += draft(model_name, variant)
  return found


def ddpo(model_name: str, variant: str) -> list[Row]:
  """The rollout, and one slice of the update, both with guidance."""
  return of_ddpo(_workload("ddpo", variant, model_name), f"DDPO {variant}")


def of_ddpo(work: workload.Workload, name: str) -> list[Row]:
  """`ddpo` of any model and config, under a guidance of ours."""
  sys, networks = work.system, _networks(work)
  branches = guidance.count_branches(**sys.guidance)
  assert branches is not None
  args = workload.rollout_args(sys, workload.tokens(sys, BATCH))
  sampled = jax.eval_shape(sys.sample_fn, *args)
  denoiser = networks.denoiser(branches * BATCH)
  texts = BATCH + (sys.model.empty is not None)
  least = denoiser.forward + networks.decode(BATCH).forward + networks.condition(texts).forward
  slices = np.zeros((1, BATCH), np.int32)
  trajectories = jax.eval_shape(online.collect, [sampled])
  labels = {"advantages": jax.ShapeDtypeStruct((BATCH,), jnp.float32)}
  samples = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  data = (trajectories, sys.pipeline.table, samples, labels)
  selection = Selection(slices, slices, slices == 0)
  update = (work.state, work.frozen, data, selection, 0, 0, 0)
  return [
    _row(f"{name}: rollout", sys.sample_fn, args, least),
    _row(f"{name}: update", work.update_fn, update, denoiser.gradient),
  ]


def dpo(model_name: str, variant: str) -> list[Row]:
  """The encoding of stored pairs, and one slice of the update, reference included."""
  work = _workload("dpo", variant, model_name)
  sys, networks = work.system, _networks(work)
  images = jax.ShapeDtypeStruct((BATCH, 2, *sys.model.sample_shape), jnp.uint8)
  data, selection = workload.pairs(work, BATCH)
  update = (work.state, work.frozen, data, selection, 0, 0, 0)
  least = networks.denoiser(2 * BATCH).gradient + networks.reference(2 * BATCH).forward
  found = [_row(f"DPO {variant}: update", work.update_fn, update, least)]
  if variant == "lora":  # the same program whatever is trained
    encode = (work.frozen, images, 0, 0, 0)
    least = networks.encode(2 * BATCH).forward
    found.append(_row("DPO: encoding", sys.encode_fn, encode, least))
  return found


def draft(model_name: str, variant: str) -> list[Row]:
  """One slice of the update: the chain, its last step, the decoder and the reward."""
  work = _workload("draft", variant, model_name)
  networks = _networks(work)
  data, selection = workload.records(work, BATCH)
  update = (work.state, work.frozen, data, selection, 0, 0, 0)
  denoiser = networks.denoiser(2 * BATCH)
  decode = networks.decode(BATCH, through_input=True)
  assert work.rewards is not None and work.rewards.device is not None
  device = work.rewards.device
  images = jax.ShapeDtypeStruct((BATCH, *work.system.model.sample_shape), jnp.float32)
  query = jax.tree.map(lambda leaf: leaf[0], data.query)  # of the one microbatch
  reward = networks.reward(device, query)
  least = denoiser.forward + denoiser.gradient + decode.gradient + reward.gradient
  found = [_row(f"DRaFT-1 {variant}: update", work.update_fn, update, least)]
  if variant == "lora":
    score = (device.params, images, query)
    found.append(_row("reward", jax.jit(device.score), score, reward.forward))
  return found


def _workload(name: str, variant: str, model_name: str) -> workload.Workload:
  config = workload.load_config(name)
  config.lora.update({"rank": 4} if variant == "lora" else {"rank": 0, "targets": ""})
  config.process.num_steps = 4
  config.guidance.scale = 5.0
  return workload.make(config, stable_diffusion.as_model(models.build(model_name)))


def _networks(work: workload.Workload) -> least_work.Networks:
  rank, tokens = work.sections["lora"]["rank"], workload.tokens(work.system, 1)
  return least_work.Networks(work.system, rank, tokens)


def _row(name: str, function: Any, args: tuple, least: float) -> Row:
  # What is read stands before code is made for the CPU, and that code is not run.
  compiled = function.lower(*args).compile({"xla_backend_optimization_level": 0})
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return Row(name, flops.compiled(compiled.as_text()), least, temporary)

