"""A pipeline: what a model offers to methods, as pure functions and tables, without parameters."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from jaxalign.diffusion.kernel import Kernel
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Process
from jaxalign.types import Array, Params

if TYPE_CHECKING:  # methods do without what some rewards need
  from jaxalign.rewards.contract import DeviceReward


class Pipeline(NamedTuple):
  """What a method sees of a model, and of the rewards of its run.

  kernel: the denoising step as it is sampled, guidance included; its `cond` is a `Guided`.
  conditional: the step without guidance; its `cond` is the first half of a `Guided`.
  table: the steps of the run's sampler.
  levels: every noise level that the network was trained on, row 0 nearest to the data.
  prediction_type: what the network predicts, as `diffusion.predictions` names it.
  latent_shape: D of `[B, *D]`.
  decode: `(frozen, x_0 [B, *D]) -> samples`.
  reward: `(frozen, samples, query, t=None) -> [B]`, differentiable in the samples; None where the
    run has no such reward. Of noised or predicted samples `t` `[B]` is the time of their noise
    level, `StepTable.t`; ValueError from a reward that takes none.
  """

  kernel: Kernel
  conditional: Kernel
  table: StepTable
  levels: StepTable
  prediction_type: str
  latent_shape: tuple[int, ...]
  decode: Callable[[Mapping[str, Params], Array], Array]
  reward: Callable[..., Array] | None = None

  def with_reward(self, device: "DeviceReward") -> "Pipeline":
    """The pipeline with a reward, whose parameters are at `frozen["rewards"]`."""

    def reward(frozen, samples, query, t=None):
      return device.value(frozen["rewards"], samples, query, t)

    return self._replace(reward=reward)

  @property
  def process(self) -> Process:
    """The table with its transition, which know which steps have noise."""
    return Process(self.table, self.kernel.transition)
