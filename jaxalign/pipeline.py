"""A pipeline: what a model offers to methods, as pure functions and tables, without parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.diffusion.kernel import Kernel
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Process
from jaxalign.types import Array, Params


class Pipeline(NamedTuple):
  """What a method sees of a model, and of the rewards of its run.

  kernel: the denoising step as it is sampled, guidance included; its `cond` is a `Guided`.
  conditional: the step without guidance; its `cond` is the first half of a `Guided`.
  table: the steps of the run's sampler.
  levels: every noise level that the network was trained on, row 0 nearest to the data.
  prediction_type: what the network predicts, as `diffusion.predictions` names it.
  latent_shape: D of `[B, *D]`.
  decode: `(frozen, x_0 [B, *D]) -> samples`.
  reward: `(frozen, samples, query) -> [B]`, differentiable in the samples; None where the run
    has no such reward.
  """

  kernel: Kernel
  conditional: Kernel
  table: StepTable
  levels: StepTable
  prediction_type: str
  latent_shape: tuple[int, ...]
  decode: Callable[[Mapping[str, Params], Array], Array]
  reward: Callable[[Mapping[str, Params], Array, Any], Array] | None = None

  @property
  def process(self) -> Process:
    """The table with its transition, which know which steps have noise."""
    return Process(self.table, self.kernel.transition)
