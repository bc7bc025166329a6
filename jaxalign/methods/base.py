"""What a method is: a pure loss, and the data that it learns from, as a value."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.data.examples import ExamplesFn
from jaxalign.labels.base import LabelFn
from jaxalign.types import Array, Key, Params


class Rollouts(NamedTuple):
  """Samples of the policy, scored and labelled in every iteration.

  label: `(memory, scores, key) -> (memory, labels)`, see `labels.base`. It says what an example is:
    a sample, or several of one record.
  by: "step" trains each step of a trajectory that has noise, and a batch is a `batches.Steps`;
    "sample" the finished sample, a `batches.Finished`.
  memory: `num_records -> tree` that labels remember from iteration to iteration.
  window: `iteration -> noise_scale [S]`: which steps of the table have noise in an iteration, for
    chains that are deterministic elsewhere; None leaves the table as it is. It is on the host, and
    the number of steps with noise is always the same.
  sampled_by: "policy", or the name of one of the method's copies.
  shared_noise: all samples of a record start from one noise.
  on_policy: the loss is right for one update an iteration only.
  kl_weight: what a nat of trajectory KL to the reference costs; it is taken off the reward before
    labels are made. The loss adds the part of the gradient that goes through the KL.
  """

  label: LabelFn
  by: str = "step"
  memory: Callable[[int], Any] = lambda num_records: None
  window: Callable[[int], Array] | None = None
  sampled_by: str = "policy"
  shared_noise: bool = False
  on_policy: bool = False
  kl_weight: float = 0.0


class Stored(NamedTuple):
  """Samples of a file, judged before the run: pairs, thumbs, scores. A batch is a
  `batches.Finished`.

  examples: `(record, **options) -> Examples`: those that a record of the file makes. The options
    are keys of the config's section `data`.
  """

  examples: ExamplesFn


class Records(NamedTuple):
  """Records alone: the loss samples for itself. A batch is a `batches.Inputs`."""


def refresh_every(iterations: int) -> Callable[[int], float]:
  """The decay of a copy that becomes the parameters every so many iterations; 0 is never."""
  return lambda i: 0.0 if iterations and (i + 1) % iterations == 0 else 1.0


class Head(NamedTuple):
  """A small network that is trained beside the policy, by the same loss: a critic.

  init: `key -> params`; how they are applied, the loss knows.
  learning_rate: of its own Adam, without clipping.
  """

  init: Callable[[Key], Params]
  learning_rate: float


class Method(NamedTuple):
  """A pure loss, and what it learns from.

  loss: `(variables, frozen, batch, key) -> (loss [B], metrics {name: [B]})`. `variables` are those
    of the policy. `frozen` holds every other tree, all arguments of the program; `["reference"]`
    are the variables of the reference and `["rewards"]` the parameters of rewards that run on the
    device. A batch is one gradient slice, and a mean over it is one over all devices.
  data: `Rollouts`, `Stored` or `Records`.
  heads: by name, found by the loss at `variables["heads"][name]`; no part of what is exported.
  copies: of the trained parameters, by name: `iteration -> decay`, on the host. After an iteration
    a copy becomes `decay * copy + (1 - decay) * parameters`: 0 copies them, 1 leaves it. A copy
    starts as what the run starts from, and the loss finds its variables at `frozen[name]`; one that
    is called "reference" takes the reference's place.
  """

  loss: Callable[[Params, Mapping[str, Params], Any, Key], tuple[Array, dict[str, Array]]]
  data: Rollouts | Stored | Records
  heads: Mapping[str, Head] = {}
  copies: Mapping[str, Callable[[int], float]] = {}
