"""Direct reward fine-tuning: the gradient of a differentiable reward through the sampler.

The methods differ in the window of the chain that is differentiated (`diffusion.backprop`). Each
adds `kl_weight` times the KL to the reference, in nats over the differentiated steps. A step
without noise has none: where they all are, a weight is refused.
"""

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import backprop, rollout
from jaxalign.diffusion import kernel as kernel_lib
from jaxalign.methods.base import Method, Records
from jaxalign.methods.batches import Inputs
from jaxalign.pipeline import Pipeline


def make_draft(pipeline: Pipeline, *, num_grad_steps: int, kl_weight: float) -> Method:
  """DRaFT-K (Clark et al. 2023, arXiv:2309.17400, section 4): the last K = `num_grad_steps` steps.

  0 differentiates through the whole chain (DRaFT); 1 is the paper's cheapest.
  """
  S = pipeline.table.num_steps
  K = num_grad_steps or S
  if not 1 <= K <= S:
    raise ValueError(
      f"config.method.num_grad_steps: expected 1 to {S} steps to differentiate through, or 0 for "
      f"all, got {num_grad_steps}"
    )
  _check_kl_weight(pipeline, kl_weight, first=S - K)

  def sample(variables, reference, batch, x_T, key):
    x_0, kl = _last_steps(key, variables, reference, pipeline, x_T, batch.cond, num_steps=K)
    return x_0, batch, kl

  return _make(pipeline, sample, kl_weight)


def make_align_prop(
  pipeline: Pipeline, *, mean_grad_steps: float, std_grad_steps: float, kl_weight: float
) -> Method:
  """AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739): a random number of last steps.

  It is normal with the given mean and std, rounded, and limited to 1..S-1; one draw for a batch, as
  a draw for each step would leave gaps in the window.
  """
  S = pipeline.table.num_steps
  _check_kl_weight(pipeline, kl_weight, first=S - max(1, S - 1))

  def sample(variables, reference, batch, x_T, key):
    key_cut, key = jax.random.split(key)
    drawn = mean_grad_steps + std_grad_steps * jax.random.normal(key_cut)
    steps = jnp.clip(jnp.round(drawn), 1, max(1, S - 1)).astype(jnp.int32)
    x_0, kl = _last_steps(
      key, variables, reference, pipeline, x_T, batch.cond, num_steps=S, first=S - steps
    )
    return x_0, batch, kl

  return _make(pipeline, sample, kl_weight)


def make_draft_lv(pipeline: Pipeline, *, num_noises: int) -> Method:
  """DRaFT-LV (arXiv:2309.17400, section 4.2): the last step, from `num_noises` fresh noisings."""

  def sample(variables, reference, batch, x_T, key):
    del reference
    key_chain, key_noises = jax.random.split(key)
    constant = jax.lax.stop_gradient(variables)
    rolled = rollout.rollout(
      key_chain,
      pipeline.kernel,
      constant,
      pipeline.table,
      x_T,
      batch.cond,
      kernel_lib.mean_over_latents,
    )

    def repeat(tree):
      return jax.tree.map(lambda leaf: leaf.repeat(num_noises, axis=0), tree)

    cond = batch.cond._replace(cond=repeat(batch.cond.cond))
    x_0 = backprop.noised_last_step(
      key_noises, pipeline.kernel, variables, pipeline.table, repeat(rolled.x_0), cond
    )
    return x_0, Inputs(cond, repeat(batch.query)), jnp.zeros(len(x_0))

  return _make(pipeline, sample, 0.0)


def make_refl(pipeline: Pipeline, *, step_range: tuple[float, float], target: float) -> Method:
  """ReFL (Xu et al. 2023, arXiv:2304.05977, algorithm 1): x_0 as predicted at one random step.

  The step is uniform over the share `step_range` of the chain (the paper: 30 to 39 of 40, that is
  0.75 to 1), one draw for a batch, and the loss relu(target - reward).
  """
  S = pipeline.table.num_steps
  first, last = (round(share * S) for share in step_range)
  if not 0 <= first < last <= S:
    raise ValueError(
      f"config.method.step_range: expected 0 <= first < last <= 1 with a step between them, got "
      f"{step_range} of {S} steps"
    )

  def sample(variables, reference, batch, x_T, key):
    del reference
    key_step, key = jax.random.split(key)
    i = jax.random.randint(key_step, (), first, last)
    kernel, table, prediction_type = pipeline.kernel, pipeline.table, pipeline.prediction_type
    x_0 = backprop.one_prediction(
      key, kernel, variables, table, prediction_type, x_T, batch.cond, i=i
    )
    return x_0, batch, jnp.zeros(len(x_T))

  return _make(pipeline, sample, 0.0, target=target)


def _check_kl_weight(pipeline: Pipeline, kl_weight: float, *, first: int) -> None:
  """Raises ValueError for a weight of a KL that no step from `first` on has."""
  if kl_weight and not any(step >= first for step in pipeline.process.noisy_steps()):
    raise ValueError(
      f"config.method.kl_weight: expected 0, because no step that is differentiated (the last "
      f"{pipeline.table.num_steps - first}) has noise, and without it there is no KL; got "
      f"{kl_weight:g}\nset it to 0, or raise eta, or noise_level, of config.process above 0"
    )


def _last_steps(key, variables, reference, pipeline: Pipeline, x_T, cond, **window):
  return backprop.last_steps(
    key, pipeline.kernel, variables, reference, pipeline.table, x_T, cond, **window
  )


def _make(pipeline: Pipeline, sample, kl_weight: float, target: float | None = None) -> Method:
  """A method from `sample(variables, reference, batch, x_T, key) -> (x_0, batch of x_0, KL)`."""
  reward_fn = pipeline.reward
  if reward_fn is None:
    raise ValueError(
      "config.reward: expected rewards that run on the device and can be differentiated, with "
      "normalize 'none'\nuse a learned one, such as 'shapes_learned'"
    )

  def loss(variables, frozen, batch: Inputs, key):
    key_start, key_sample = jax.random.split(key)
    num_records = len(jax.tree.leaves(batch.cond.cond)[0])
    x_T = jax.random.normal(key_start, (num_records, *pipeline.latent_shape))
    reference = frozen["reference"] if kl_weight else None
    x_0, scored, kl = sample(variables, reference, batch, x_T, key_sample)
    reward = reward_fn(frozen, pipeline.decode(frozen, x_0), scored.query)
    value = losses.reward_loss(reward, target=target) + kl_weight * kl
    values = {"reward/mean": reward} | ({"kl/window": kl} if kl_weight else {})

    def per_record(leaf):  # several samples of one record are one example
      return leaf.reshape(num_records, -1).mean(axis=1)

    return per_record(value), jax.tree.map(per_record, values)

  return Method(loss, Records())
