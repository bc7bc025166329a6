"""Online DPO: Diffusion-DPO on the best and the worst of what the policy samples (2402.04792).

Any reward is the annotator. Of each record's samples the two that differ most become a pair, and
the loss is that of stored pairs, `methods.diffusion_dpo`, with its log-ratios of denoising errors.
"""

import dataclasses

from jaxalign.labels import pairs
from jaxalign.methods import diffusion_dpo
from jaxalign.methods.base import Method, Rollouts, refresh_every
from jaxalign.pipeline import Pipeline


def make(
  pipeline: Pipeline,
  *,
  beta: float,
  temperature: float,
  refresh: int,
  time_weight: str,
  num_draws: int,
) -> Method:
  """Online DPO.

  Args:
    pipeline: the model.
    beta: as in `diffusion_dpo.make_dpo`.
    temperature: of the annotator, who prefers the better one with probability
      sigmoid(difference / temperature): soft labels, under which the optimum of the loss is the
      reference tilted by exp(reward / (temperature beta)), beta in nats. At 0 the better one always
      wins, and the margin has no finite optimum.
    refresh: iterations after which the reference becomes the policy, again and again ("iterative
      DPO"); 0 keeps the one that the run starts from.
    time_weight, num_draws: as in `diffusion_dpo.make`.
  """
  offline = diffusion_dpo.make_dpo(
    pipeline, beta=beta, time_weight=time_weight, num_draws=num_draws
  )

  def label(memory, scores, key):
    memory, labels = pairs.best_and_worst(memory, scores, key)
    p = pairs.choice_probability(labels.values["gap"], temperature=temperature)
    return memory, dataclasses.replace(labels, values={**labels.values, "p": p})

  def loss(variables, frozen, batch, key):
    value, metrics = offline.loss(variables, frozen, batch, key)
    return batch.labels["weight"] * value, metrics  # of a tie 0

  copies = {"reference": refresh_every(refresh)} if refresh else {}
  return Method(loss, Rollouts(label, by="sample"), copies=copies)
