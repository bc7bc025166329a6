import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import reward_model as losses

REWARD_W = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
REWARD_L = np.array([0.0, 1.0, 0.5, -1.0], np.float32)
P = np.array([1.0, 0.7, 0.2, 0.5], np.float32)


def bradley_terry(reward_w=REWARD_W, reward_l=REWARD_L, p=P):
  return losses.bradley_terry_loss(reward_w, reward_l, p=p)


def test_bradley_terry_by_hand():
  # d = 1, -3, 0, 4; -log sigmoid(d) = log(1 + e^-d) and -log sigmoid(-d) = d + log(1 + e^-d):
  # loss = (1 - p) d + log(1 + e^-d).
  expected = [0.3132617, 0.3 * -3.0 + 3.0485874, 0.6931472, 0.5 * 4.0 + 0.0181499]
  np.testing.assert_allclose(bradley_terry(), expected, rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_equal_rewards_cost_log_2_whatever_the_label(p):
  loss = bradley_terry(REWARD_W, REWARD_W, np.full(4, p, np.float32))
  np.testing.assert_allclose(loss, np.full(4, math.log(2)), rtol=1e-6)


def test_gradient_is_the_error_of_the_probability():
  # d loss / d reward_w = sigmoid(d) - p, and the opposite for reward_l.
  by_w, by_l = jax.grad(lambda w, l: bradley_terry(w, l).sum(), (0, 1))(REWARD_W, REWARD_L)
  sigmoid = 1 / (1 + np.exp(REWARD_L - REWARD_W))
  np.testing.assert_allclose(by_w, sigmoid - P, atol=1e-6)
  np.testing.assert_array_equal(by_l, -by_w)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_optimum_is_at_the_logit_of_p_and_costs_its_entropy(p):
  best = np.full(1, math.log(p / (1 - p)), np.float32)
  label = np.full(1, p, np.float32)
  zero = np.zeros(1, np.float32)
  loss, grad = jax.value_and_grad(lambda d: bradley_terry(d, zero, label).sum())(best)
  np.testing.assert_allclose(grad, [0.0], atol=1e-7)
  np.testing.assert_allclose(loss, -p * math.log(p) - (1 - p) * math.log(1 - p), rtol=1e-6)


def test_a_constant_of_the_prompt_changes_nothing():
  # Powers of two and small multiples of 0.5, so that the sums are exact.
  shift = np.array([8.0, -4.0, 2.0, 0.5], np.float32)
  np.testing.assert_array_equal(bradley_terry(REWARD_W + shift, REWARD_L + shift), bradley_terry())


def test_exchanging_the_pair_and_the_label_changes_nothing():
  np.testing.assert_allclose(bradley_terry(REWARD_L, REWARD_W, 1 - P), bradley_terry(), rtol=1e-6)


def test_bradley_terry_is_finite_far_from_the_optimum():
  loss, grad = jax.value_and_grad(lambda w: bradley_terry(w, np.zeros(4, np.float32)).sum())(
    np.array([1e4, -1e4, 1e4, -1e4], np.float32)
  )
  assert np.isfinite(loss) and np.isfinite(grad).all()


def test_no_gradient_to_the_label():
  grad = jax.grad(lambda p: bradley_terry(p=p).sum())(P)
  np.testing.assert_array_equal(grad, np.zeros(4))


def test_unequal_shapes_are_refused():
  with pytest.raises(ValueError, match=r"equal shapes.*reward_l"):
    bradley_terry(reward_l=REWARD_L[:, None])
  with pytest.raises(ValueError, match=r"equal shapes.*'p': \(\)"):
    bradley_terry(p=np.float32(1.0))


# ---- contrastive_loss

LOGITS = np.log(np.array([[4.0, 1.0, 1.0], [2.0, 2.0, 4.0], [2.0, 1.0, 5.0]], np.float32))
NONE = np.zeros((3, 3), bool)


def contrastive(logits=LOGITS, also_true=NONE):
  return losses.contrastive_loss(logits, also_true=also_true)


def test_contrastive_by_hand():
  # Rows: 4/6, 2/8, 5/8. Columns: 4/8, 2/4, 5/10. Half the sum of the negative logarithms.
  rows, columns = np.log([4 / 6, 2 / 8, 5 / 8]), np.log([4 / 8, 2 / 4, 5 / 10])
  np.testing.assert_allclose(contrastive(), -(rows + columns) / 2, rtol=1e-6)


def test_images_without_a_caption_are_negatives_of_all():
  # A fourth row of 2, 1, 1 joins the columns: 4/10, 2/5, 5/11. The rows stay as they are.
  logits = np.concatenate([LOGITS, np.log(np.float32([[2.0, 1.0, 1.0]]))])
  rows, columns = np.log([4 / 6, 2 / 8, 5 / 8]), np.log([4 / 10, 2 / 5, 5 / 11])
  found = contrastive(logits, np.zeros((4, 3), bool))
  np.testing.assert_allclose(found, -(rows + columns) / 2, rtol=1e-6)


def test_what_is_also_true_is_no_negative():
  # Caption 2 is true of image 1: row 1 becomes 2/4 and column 2 becomes 5/6.
  also_true = NONE.copy()
  also_true[1, 2] = True
  rows, columns = np.log([4 / 6, 2 / 4, 5 / 8]), np.log([4 / 8, 2 / 4, 5 / 6])
  np.testing.assert_allclose(contrastive(also_true=also_true), -(rows + columns) / 2, rtol=1e-6)
  grad = jax.grad(lambda logits: contrastive(logits, also_true).sum())(LOGITS)
  assert grad[1, 2] == 0.0 and np.isfinite(grad).all()


def test_the_own_caption_is_always_kept():
  np.testing.assert_array_equal(contrastive(also_true=np.eye(3, dtype=bool)), contrastive())
  alone = contrastive(also_true=~NONE)
  np.testing.assert_array_equal(alone, np.zeros(3))


def test_equal_logits_cost_the_logarithm_of_the_batch():
  np.testing.assert_allclose(contrastive(np.zeros((3, 3))), np.full(3, math.log(3)), rtol=1e-6)


def test_jit_equals_no_jit():
  np.testing.assert_array_equal(jax.jit(bradley_terry)(), bradley_terry())
  # XLA fuses the two softmaxes.
  np.testing.assert_allclose(jax.jit(contrastive)(jnp.array(LOGITS)), contrastive(), rtol=1e-6)
