"""The GPU cases, our side, at full size with random weights: calls by variant."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import streams, system
from jaxalign.benchmarks import cpu, measure, models, workload
from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import clip_vision
from jaxalign.rewards import DeviceReward

ROLLOUT_BATCHES = (1, 8, 32)
ROLLOUT_STEPS, ROLLOUT_GUIDANCE = 50, 7.5
DDPO_IMAGES, DDPO_MICROBATCH, DDPO_STEPS, DDPO_GUIDANCE = 64, 8, 50, 5.0
DPO_BATCHES = (1, 2, 4, 8)
CLIP_L_VISION: dict[str, Any] = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "image_size": 224,
  "patch_size": 14,
}


def gemm(name: str, folder: str | os.PathLike) -> measure.Calls:
  """A product of two 8192 x 8192 matrices in bfloat16, 1.1 TFLOP: the limit that was reached."""
  del name, folder
  x = jnp.ones((8192, 8192), jnp.bfloat16)
  multiply = jax.jit(lambda x: x @ x)
  return {"GEMM 8192": lambda: float(jax.block_until_ready(multiply(x))[0, 0])}


def rollout(name: str, folder: str | os.PathLike) -> measure.Calls:
  """Images of 50 guided steps, decoded, at several batch sizes."""
  folder = pathlib.Path(folder)
  model = models.build(name).with_compute(dtype="bfloat16", remat="none")
  sys = system.from_model(
    stable_diffusion.as_model(model),
    seed=0,
    lora=system.NO_LORA,
    process={"transition": "ddim", "num_steps": ROLLOUT_STEPS, "eta": 0.0},
    guidance={"scale": ROLLOUT_GUIDANCE},
  )

  def sample(batch: int) -> float:
    args = workload.rollout_args(sys, workload.tokens(sys, batch))
    return float(jnp.mean(sys.sample_fn(*args).samples))

  return {
    **{f"batch {batch}": bound(sample, batch) for batch in ROLLOUT_BATCHES},
    **gemm(name, folder),
  }


def ddpo(name: str, folder: str | os.PathLike) -> measure.Calls:
  """An iteration of configs/ddpo_sd15.py on fewer images, scored by a network of aesthetic size."""
  folder = pathlib.Path(folder)
  config = workload.load_config("ddpo_sd15")
  assert (config.process.num_steps, config.guidance.scale) == (DDPO_STEPS, DDPO_GUIDANCE)
  config.data.source = "shapes/train"
  config.reward.names = (f"{__name__}:aesthetic_size",)
  config.batch.update({
    "num_records": DDPO_IMAGES,
    "microbatch": DDPO_MICROBATCH,
    "updates_per_epoch": 1,
  })
  config.advantage = {"name": "batch", "epsilon": 1e-6, "limit": 5.0}
  model = models.build(name).with_compute(dtype="bfloat16", remat="none")
  return {**cpu.ddpo_calls(config, model, folder), **gemm(name, folder)}


def aesthetic_size() -> DeviceReward:
  """A score from the image tower of CLIP-L/14, with random weights."""
  config = clip_vision.CLIPVisionConfig(**CLIP_L_VISION)
  rng = streams.generator(0, "benchmark reward")
  shapes = tower_shapes(config)
  params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
  return score_of_tower(config, params)


def tower_shapes(config: clip_vision.CLIPVisionConfig) -> Any:
  """The parameters of an image tower, as shapes."""
  tower = clip_vision.VisionTransformer(config)
  images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
  return jax.eval_shape(tower.init, streams.key_shape(), images)["params"]


def score_of_tower(config: clip_vision.CLIPVisionConfig, params: Any) -> DeviceReward:
  """The mean of what the tower says of an image, with parameters that may be shapes."""
  tower = clip_vision.VisionTransformer(config)

  def score(params: Any, images: Any, features: Any) -> Any:
    del features
    inputs = clip_vision.preprocess(images, config.image_size)
    encoded: Any = tower.apply({"params": params}, inputs)
    return jnp.mean(encoded, axis=-1)

  return DeviceReward("aesthetic_size", params, lambda prompts: np.zeros(len(prompts)), score)


def dpo(name: str, folder: str | os.PathLike) -> measure.Calls:
  """Updates of configs/dpo_sdxl.py on latents that are at hand, at several batch sizes."""
  folder = pathlib.Path(folder)
  updates = _Updates(models.build(name).with_compute(dtype="bfloat16", remat="dots"))
  calls = {
    f"{label}, {count} pairs": bound(updates.run, variant, count)
    for label, variant in (("full", ""), ("LoRA r8", "lora"))
    for count in DPO_BATCHES
  }
  return {**calls, **gemm(name, folder)}


class _Updates:
  """Updates of one variant at a time: with all weights trained, two would not fit."""

  def __init__(self, model: stable_diffusion.StableDiffusion):
    self._model = model
    self._variant: str | None = None
    self._work: Any = None
    self._state: Any = None

  def run(self, variant: str, count: int) -> float:
    if variant != self._variant:
      self._work = self._state = None  # freed before the next one is made
      config = workload.load_config("dpo_sdxl", variant)
      self._work = workload.make(config, stable_diffusion.as_model(self._model))
      self._state, self._variant = self._work.state, variant
    data, selection = workload.pairs(self._work, count)
    args = (self._work.frozen, data, selection, 0, 0, 0)
    self._state, values = self._work.update_fn(self._state, *args)
    return float(jnp.mean(values["loss/total"]))


def bound(function: Any, *args: Any) -> Any:
  """A call of the function with these arguments."""
  return lambda: function(*args)
