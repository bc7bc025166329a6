"""Preference losses on log-ratios to a reference, and their diagnostics.

A log-ratio is `log p_theta(x) - log p_ref(x)` of one sample, whatever estimated it: the denoising
error of a diffusion model, a sampled trajectory, or an exact likelihood. Nothing here knows which.
`w` is the winner of a pair and `l` the loser, and `p` the probability that w is preferred to l: 1
for a plain label, 0.5 for a tie. To swap w and l while p becomes 1 - p changes no loss.
"""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape


def dpo_loss(
  log_ratio_w: Array,  # [B]
  log_ratio_l: Array,  # [B]
  *,
  beta: float,
  p: Array,  # [B], in [0, 1]
) -> Array:  # [B]
  """Direct preference optimisation with soft labels, one value per pair.

    d    = beta (log_ratio_w - log_ratio_l)
    loss = -(p log sigmoid(d) + (1 - p) log sigmoid(-d))

  With p = 1 it is Rafailov et al. 2023 (arXiv:2305.18290) eq. 7, and with denoising errors the loss
  of Diffusion-DPO (arXiv:2311.12908), eq. 14. With other p it is the expected loss of a label drawn
  from p, as in `losses.reward_model.bradley_terry_loss`; "conservative DPO" where p is the same for
  all. The optimum is at d = logit(p), so a tie pulls the two log-ratios together. log 2 at the
  reference, where the gradient in the winner's log-ratio is -beta (p - 1/2).
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l, p=p)
  p = jax.lax.stop_gradient(p)
  d = beta * (log_ratio_w - log_ratio_l)
  return -(p * jax.nn.log_sigmoid(d) + (1.0 - p) * jax.nn.log_sigmoid(-d))


def ipo_loss(
  log_ratio_w: Array,  # [B]
  log_ratio_l: Array,  # [B]
  *,
  tau: float,
  p: Array,  # [B], in [0, 1]
) -> Array:  # [B]
  """Identity preference optimisation with soft labels, one value per pair.

    d    = log_ratio_w - log_ratio_l
    loss = (d - (2 p - 1) / (2 tau))^2

  With p = 1 it is Azar et al. 2023 (arXiv:2310.12036) eq. 17. For other p it is the expected eq. 17
  of a label drawn from p, but for a term without d:

    p (d - 1 / (2 tau))^2 + (1 - p) (-d - 1 / (2 tau))^2 = loss + p (1 - p) / tau^2

  A tie's target is 0. The target is finite, so that it means something only with log-ratios in
  nats: see `diffusion.log_ratios` for estimators on that scale.
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l, p=p)
  p = jax.lax.stop_gradient(p)
  return jnp.square(log_ratio_w - log_ratio_l - (2.0 * p - 1.0) / (2.0 * tau))


def clip_log_ratio(log_ratio: Array, *, clip_range: float) -> Array:  # any shape
  """`log(clip(exp(log_ratio), 1 - c, 1 + c))` with c = `clip_range`, as D3PO and SPO clip.

  The ratio is clipped before its logarithm (arXiv:2311.13231, official code). Unlike the clipped
  surrogate of PPO it has no gradient on either side of the interval, also where the gradient would
  lead back.
  """
  return jnp.clip(log_ratio, jnp.log1p(-clip_range), jnp.log1p(clip_range))


def implicit_accuracy(
  log_ratio_w: Array,  # [B]
  log_ratio_l: Array,  # [B]
  *,
  p: Array,  # [B], in [0, 1]
) -> Array:  # [B], in [0, 1]
  """The probability that a label drawn from `p` is what the policy prefers; no gradient.

  With p = 1 it is 1 where the policy has moved towards the winner more than towards the loser, and
  else 0. A tie has no right answer: it counts one half whatever the policy does, and a vote of 6 to
  4 at most 0.6. Equal log-ratios count one half too, so that the mean starts at 0.5; the official
  code of Diffusion-DPO counts them as wrong.
  """
  check_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l, p=p)
  return 0.5 + jax.lax.stop_gradient((p - 0.5) * jnp.sign(log_ratio_w - log_ratio_l))
