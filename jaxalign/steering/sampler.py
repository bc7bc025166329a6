"""Test-time steering: what a sampler is, and the plain chain that all others are compared with.

Steering changes what is sampled and no parameters. A sampler sees the `Pipeline` of a model, and
whoever draws from one, a command, an evaluation or a feed, does not ask which it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.diffusion.guidance import Guided
from jaxalign.diffusion.kernel import mean_over_latents
from jaxalign.diffusion.schedules import StepTable
from jaxalign.pipeline import Pipeline
from jaxalign.types import Array, Key, Params


class Inputs(NamedTuple):
  """What a sampler is given of m records.

  cond: what the network sees of them; leaves `[m, ...]`, and `[1, ...]` of the empty condition.
  x_T: `[m, *D]`, the noise that the chains start from, or the first of several does.
  query: what the reward wants to know of them, a tree of `[m, ...]`; None without a reward.
  """

  cond: Guided
  x_T: Array
  query: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """A microbatch of finished samples.

  rollout: the trajectories that the samples are the ends of, if they are the chain's own draws, so
    that a loss or a KL may take their log-probabilities; else None.
  cond: leaves `[m, ...]` and `[1, ...]`: what the policy saw.
  samples: `[m, ...]`, as the model decodes them.
  x_0: `[m, *D]`, what they are decoded from.
  info: `{name: [m]}`: what the sampler has to say of each, such as its reward.
  """

  rollout: rollout_lib.Rollout | None
  cond: Guided
  samples: jax.Array
  x_0: Array | None = None
  info: Mapping[str, Array] = dataclasses.field(default_factory=dict)


SampleFn = Callable[[Key, Params, Mapping[str, Params], Inputs, StepTable], Sampled]


class Sampler(NamedTuple):
  """A way to draw samples from a model.

  sample: pure `(key, variables, frozen, inputs, table) -> Sampled`. `variables` is what the network
    is applied to; `frozen` has the model's other components and, at "rewards", the parameters of
    the pipeline's reward.
  kl_bound: nats. The law of what it draws for a record differs from the chain's by this KL at most;
    0 where the two are one, None where nothing is known.
  keeps_trajectory: whether `Sampled.rollout` is there.
  name, settings: what it was made by, for reports; `make` fills them in.
  """

  sample: SampleFn
  kl_bound: float | None = None
  keeps_trajectory: bool = False
  name: str = ""
  settings: Mapping[str, Any] = MappingProxyType({})

  def report(self) -> dict[str, Any]:
    """What evaluation.json holds."""
    return {**self.settings, "name": self.name, "kl_bound": self.kl_bound}


def in_words(report: Mapping[str, Any]) -> str:
  """One line that says what `Sampler.report` does."""
  settings = [
    f"{name} {', '.join(value) if name == 'rewards' else value}"
    for name, value in report.items()
    if name not in ("name", "kl_bound")
  ]
  bound = report["kl_bound"]
  known = "not known" if bound is None else f"at most {bound:.4f} nats"
  shown = f" ({'; '.join(settings)})" if settings else ""
  return f"sampler {report['name']}{shown}: KL to the chain {known}"


def make_chain(pipeline: Pipeline) -> Sampler:
  """The chain: every step of the table once, as the kernel says; what policies are trained by."""

  def sample(key, variables, frozen, inputs, table):
    rolled = rollout_lib.rollout(
      key, pipeline.kernel, variables, table, inputs.x_T, inputs.cond, mean_over_latents
    )
    samples = pipeline.decode(frozen, rolled.x_0)
    return Sampled(rolled, inputs.cond, samples, rolled.x_0)

  return Sampler(sample, kl_bound=0.0, keeps_trajectory=True)
