"""The floor of log-ratios and KLs in bfloat16: what rounding alone makes them read.

The reference is compared with itself, computed in float32 from the same weights, by the estimators
that compare the policy with it. The true figures are 0. Policy and reference round apart as soon as
their weights differ at all, so a figure of a run that is not well above this floor says nothing.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import streams
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.diffusion import log_ratios
from jaxalign.distributed import placement, sharding
from jaxalign.models.model import Tokens
from jaxalign.system import CHAIN, Sampled, System
from jaxalign.training import metrics
from jaxalign.types import Array, DenoiseFn, Key, Params

KL, LOG_RATIO = "floor/kl_to_ref", "floor/log_ratio"  # the names of the metrics


class Floor(NamedTuple):
  """Means over a microbatch.

  kl: nats of a whole trajectory, None where no step has noise.
  log_ratio: root mean square of half a denoising error's difference, which the losses on stored
    pairs multiply by beta.
  """

  kl: float | None
  log_ratio: float

  def metrics(self) -> dict[str, float | None]:
    return {KL: self.kl, LOG_RATIO: self.log_ratio}

  def __str__(self) -> str:
    kl = "" if self.kl is None else f", and a trajectory KL of {self.kl:.2g} nats"
    return f"rounding alone makes log-ratios of about {self.log_ratio:.1e}{kl}"


def measure(sys: System, tokens: Tokens, *, seed: int) -> Floor | None:
  """The floor on one microbatch of records, for three times the cost of sampling it.

  None where the network computes in float32.
  """
  if sys.model.exact is None:
    return None
  if not sys.sampler.keeps_trajectory:
    sys = sys.with_sampler(CHAIN)
  noise = (seed, streams.number("evaluation"), 0, 0, None, sys.pipeline.table)
  sampled = sys.sample_fn(sys.policy.params, sys.frozen, tokens, *noise)
  measure_fn = make_measure_fn(sys)
  kl, log_ratio = measure_fn(sys.policy.params, sys.frozen, sampled, streams.stream(seed, "floor"))
  log_ratio = float(np.sqrt(np.mean(np.square(log_ratio))))
  return Floor(float(np.mean(kl)) if sys.process.noisy_steps() else None, log_ratio)


def recorded_kl(workdir: str | os.PathLike) -> float | None:
  """The floor of the KL that a run logged in its first iteration, if it did."""
  workdir = pathlib.Path(workdir)
  logged = metrics.read(workdir) if (workdir / "metrics.jsonl").exists() else []
  return logged[0].get(KL) if logged else None


def make_measure_fn(sys: System) -> Callable[..., tuple]:
  """Jitted `(params, frozen, sampled, key) -> (kl [B], log_ratio [B])`."""
  exact = sys.model.exact or sys.model.denoise
  guided = guidance_lib.make(exact, **sys.guidance)
  exact = guidance_lib.told(exact, **sys.guidance)

  def measure(
    params: Params, frozen: Mapping[str, Params], sampled: Sampled, key: Key
  ) -> tuple[Array, Array]:  # [B], [B]
    # Cast as the network wants them: the rounding of weights is the same for both.
    reference = sys.policy.ready(params, frozen)["reference"]
    rounded, exactly = {"rounded": reference}, {"exact": reference}
    assert sampled.rollout is not None  # of the chain, see `measure`
    x, cond, pipeline = sampled.rollout.x, sampled.cond, sys.pipeline
    kernel = pipeline.kernel._replace(denoise_fn=_either(pipeline.kernel.denoise_fn, guided))
    kl = log_ratios.trajectory_kl(kernel, rounded, exactly, pipeline.table, x, cond)
    key_level, key_eps = jax.random.split(key)
    log_ratio = log_ratios.denoising_log_ratio(
      rounded,
      exactly,
      _either(pipeline.conditional.denoise_fn, exact),
      pipeline.levels[jax.random.randint(key_level, x.shape[1:2], 0, pipeline.levels.num_steps)],
      pipeline.prediction_type,
      x[-1],
      jax.random.normal(key_eps, x.shape[1:]),
      cond.cond,
      log_ratios.half,
    )
    return jnp.sum(kl, axis=0), log_ratio

  return placement.jit(measure, sys.mesh, out_shardings=sharding.replicated(sys.mesh))


def _either(rounded: DenoiseFn, exact: DenoiseFn) -> DenoiseFn:
  """One network for the estimators, which tells by the parameters in which precision to compute."""

  def denoise_fn(params, x_t, t, cond):
    if "exact" in params:
      return exact(params["exact"], x_t, t, cond)
    return rounded(params["rounded"], x_t, t, cond)

  return denoise_fn
