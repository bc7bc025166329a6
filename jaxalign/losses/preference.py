"""Preference losses on log-ratios to a reference, and their diagnostics.

A log-ratio is `log p_theta(x) - log p_ref(x)` of one sample, whatever estimated it: the denoising
error of a diffusion model, a sampled trajectory, or an exact likelihood. Nothing here knows which.
`w` is the winner of a pair and `l` the loser.
"""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape


def dpo_loss(
  log_ratio_w: Array,  # [B]
  log_ratio_l: Array,  # [B]
  *,
  beta: float,
) -> Array:  # [B]
  """Direct preference optimisation, one value per pair.

    loss = -log sigmoid(beta (log_ratio_w - log_ratio_l))

  Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; with denoising errors it is the loss of
  Diffusion-DPO (arXiv:2311.12908), eq. 14. log 2 at the reference, where its gradient in the
  winner's log-ratio is -beta / 2.
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l)
  return -jax.nn.log_sigmoid(beta * (log_ratio_w - log_ratio_l))


def ipo_loss(
  log_ratio_w: Array,  # [B]
  log_ratio_l: Array,  # [B]
  *,
  tau: float,
) -> Array:  # [B]
  """Identity preference optimisation, one value per pair.

    loss = (log_ratio_w - log_ratio_l - 1 / (2 tau))^2

  Azar et al. 2023 (arXiv:2310.12036) eq. 17. Its target is finite, so that it means something only
  with log-ratios in nats: see `diffusion.log_ratios` for estimators on that scale.
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l)
  return jnp.square(log_ratio_w - log_ratio_l - 1.0 / (2.0 * tau))


def clip_log_ratio(log_ratio: Array, *, clip_range: float) -> Array:  # any shape
  """`log(clip(exp(log_ratio), 1 - c, 1 + c))` with c = `clip_range`, as D3PO and SPO clip.

  The ratio is clipped before its logarithm (arXiv:2311.13231, official code). Unlike the clipped
  surrogate of PPO it has no gradient on either side of the interval, also where the gradient would
  lead back.
  """
  return jnp.clip(log_ratio, jnp.log1p(-clip_range), jnp.log1p(clip_range))


def implicit_accuracy(log_ratio_w: Array, log_ratio_l: Array) -> Array:  # [B], 0.0, 0.5 or 1.0
  """1 where the policy has moved towards the winner more than towards the loser; no gradient.

  Equal log-ratios count one half, so that it starts at 0.5. The official code of Diffusion-DPO
  counts them as wrong.
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l)
  return 0.5 + 0.5 * jax.lax.stop_gradient(jnp.sign(log_ratio_w - log_ratio_l))
