"""The CPU cases, our side: calls by variant, for `measure.serve`."""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import streams
from jaxalign.benchmarks import measure, models, workload
from jaxalign.models.adapters import lora
from jaxalign.models.adapters import policy as policy_lib
from jaxalign.models.families import stable_diffusion
from jaxalign.training import feeds

BATCH = 8
STEPS = 4


def inputs(model: stable_diffusion.StableDiffusion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`(x_t [8, h, w, 4], t [8], text [8, 77, D])`, the same numbers for every side."""
  rng = streams.generator(0, "benchmark inputs")
  width = model.networks.unet.config.cross_attention_dim
  x_t = rng.standard_normal((BATCH, *model.latent_shape), np.float32)
  text = rng.standard_normal((BATCH, model.context_length, width), np.float32)
  return x_t, np.full(BATCH, 500, np.int32), text


def unet_forward(name: str, folder: str | os.PathLike) -> measure.Calls:
  """One forward pass of the UNet, and four in one program, each step a little of the prediction."""
  del folder
  model = models.build(name)
  x_t, t, text = (jnp.asarray(x) for x in inputs(model))
  params = jax.device_put(model.params["unet"])

  @jax.jit
  def forward(params, x_t):
    return model.denoise({"params": params}, x_t, t, {"text": text})

  @jax.jit
  def steps(params, x_t):
    def step(x_t, _):
      return x_t - 0.1 * model.denoise({"params": params}, x_t, t, {"text": text}), None

    return jax.lax.scan(step, x_t, None, length=STEPS)[0]

  return {
    "forward": lambda: _size(forward(params, x_t)),
    "4 steps": lambda: _size(steps(params, x_t)),
  }


def unet_gradient(name: str, folder: str | os.PathLike) -> measure.Calls:
  """The gradient of the mean square of the prediction: of every weight, and of adapters."""
  del folder
  model = models.build(name)
  x_t, t, text = (jnp.asarray(x) for x in inputs(model))
  params = jax.device_put(model.params["unet"])

  def gradient_of(policy: policy_lib.Policy) -> Callable[[], float]:
    @jax.jit
    def gradient(params, base):
      def loss(params):
        prediction = model.denoise(policy.variables(params, base), x_t, t, {"text": text})
        return jnp.mean(jnp.square(prediction))

      return jax.value_and_grad(loss)(params)

    return lambda: float(jax.block_until_ready(gradient(policy.params, policy.base))[0])

  def make(rank, targets):
    key = streams.stream(0, "policy")
    return policy_lib.make_policy(params, key, rank=rank, alpha=4.0, targets=targets)

  return {"full": gradient_of(make(0, "")), "LoRA r4": gradient_of(make(4, lora.ATTENTION))}


IMAGES, MICROBATCH, DDPO_STEPS, GUIDANCE = 16, 8, 10, 5.0


def ddpo_epoch(name: str, folder: str | os.PathLike) -> measure.Calls:
  """An iteration of DDPO with adapters of rank 4 and the JPEG reward, through our own feed."""
  folder = pathlib.Path(folder)
  config = workload.load_config("ddpo", "lora")
  config.lora.update({"rank": 4, "alpha": 4.0})
  config.process.num_steps = DDPO_STEPS
  config.guidance.scale = GUIDANCE
  config.reward.names = ("jpeg_compressibility",)
  config.batch.update({
    "num_records": IMAGES,
    "group_size": 1,
    "microbatch": MICROBATCH,
    "timestep_range": (0.0, 1.0),
  })
  config.advantage = {"name": "batch", "epsilon": 1e-6, "limit": 5.0}
  return ddpo_calls(config, models.build(name), folder)


def ddpo_calls(
  config, model: stable_diffusion.StableDiffusion, folder: str | os.PathLike
) -> measure.Calls:
  """Iterations of the config: sampling, rewards, and every update."""
  folder = pathlib.Path(folder)
  work = workload.make(config, stable_diffusion.as_model(model))
  feed = feeds.make(work.setup, folder)
  state, step = work.state, 0

  def epoch() -> float:
    nonlocal state, step
    state, data, selections, record = feed.draw(state, step)
    for j, selection in enumerate(selections):
      state, _ = work.update_fn(state, work.frozen, data, selection, 0, step, j)
    jax.block_until_ready(state)
    step += 1
    return record["reward/mean"]

  return {"epoch": epoch}


def _size(x: jax.Array) -> float:
  return float(jnp.sqrt(jnp.mean(jnp.square(x))))
