"""Losses that train a reward model: on preferences between images, and on images with captions."""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape


def bradley_terry_loss(
  reward_w: Array,  # [B]
  reward_l: Array,  # [B]
  *,
  p: Array,  # [B], in [0, 1]
) -> Array:  # [B]
  """Cross-entropy of the Bradley-Terry model with soft labels, one value per pair.

    d    = reward_w - reward_l
    loss = -(p * log sigmoid(d) + (1 - p) * log sigmoid(-d))

  Bradley & Terry 1952; with p = 1 it is the loss of InstructGPT (arXiv:2203.02155) eq. 1, with soft
  labels that of PickScore (arXiv:2305.01569) section 4, up to PickScore's constant for ties.

  `p` is the probability that w is preferred: 1 for a plain label, 0.5 for a tie. The optimum is at
  d = logit(p), and the floor there is the entropy of p, log 2 for a tie. Only the difference of two
  rewards of one prompt matters: adding a constant to both changes nothing. Gradient flows through
  both rewards.
  """
  check_same_shape(reward_w=reward_w, reward_l=reward_l, p=p)
  p = jax.lax.stop_gradient(p)
  difference = reward_w - reward_l
  return -(p * jax.nn.log_sigmoid(difference) + (1.0 - p) * jax.nn.log_sigmoid(-difference))


def contrastive_loss(
  logits: Array,  # [N, B], image i against caption j; N >= B
  *,
  also_true: Array,  # [N, B] bool
) -> Array:  # [B]
  """Symmetric InfoNCE, one value per pair of an image and its caption.

    loss_i = -(log softmax_j(logits[i, j]) + log softmax_j(logits[j, i]))[j = i] / 2

  Radford et al. 2021 (arXiv:2103.00020) figure 3. Where `also_true`, caption j describes image i as
  well, although it was drawn for another image; such a pair is no negative and is left out of both
  softmaxes. The diagonal is always kept. Images beyond the first B have no caption of their own:
  they are negatives of all.
  """
  check_same_shape(logits=logits, also_true=also_true)
  own = jnp.eye(len(logits), logits.shape[1], dtype=bool)
  logits = jnp.where(also_true & ~own, -jnp.inf, logits)
  of_captions = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
  of_images = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
  return -0.5 * (of_captions + of_images)
