"""The split of a denoiser into trained and frozen trees, on a small network of the same layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import layers, policy


class Net(nn.Module):
  """A convolution and two linear layers, named as the attention of a UNet."""

  @nn.compact
  def __call__(self, x):
    x = layers.Conv(6, name="conv_in")(x)
    x = jnp.tanh(layers.Dense(5, name="to_q")(x))
    return layers.Dense(3, name="to_out_0")(x)


NET = Net()
X = jax.random.normal(jax.random.key(1), (2, 5, 7, 3))
BASE = NET.init(jax.random.key(0), X)["params"]
LORA = dict(rank=2, alpha=6.0, targets=r"(to_q|to_out_0)$")


def make(**changes):
  return policy.make_policy(BASE, jax.random.key(2), **{**LORA, **changes})


apply = jax.jit(NET.apply)


@pytest.mark.parametrize("changes", [{}, {"targets": "conv_in"}, {"rank": 0}, {"alpha": 0.5}])
def test_at_the_start_the_policy_is_the_reference_bit_for_bit(changes):
  made = make(**changes)
  actual = apply(made.variables(made.params, made.base), X)
  assert np.asarray(actual).tobytes() == np.asarray(apply({"params": BASE}, X)).tobytes()


def test_lora_trains_adapters_alone_and_scales_them():
  made = make()
  assert set(made.params) == {"lora"} and set(made.params["lora"]) == {"to_q", "to_out_0"}
  params = jax.tree.map(jnp.ones_like, made.params)
  variables = made.variables(params, made.base)
  assert set(variables) == {"params", "lora"}
  actual = apply(variables, X)
  # By hand: every a and b is 1, alpha / rank = 3, so each kernel gains rank * 3 = 6 everywhere.
  merged = dict(BASE)
  for name in ("to_q", "to_out_0"):
    merged[name] = {**BASE[name], "kernel": BASE[name]["kernel"] + 6.0}
  np.testing.assert_allclose(actual, apply({"params": merged}, X), rtol=2e-4, atol=2e-4)


def test_lora_shares_the_base_and_copies_nothing():
  made = make()
  pairs = zip(jax.tree.leaves(made.base["params"]), jax.tree.leaves(BASE), strict=True)
  assert all(one is other for one, other in pairs)


def test_the_first_gradient_of_an_adapter_reaches_b_only():
  made = make()

  @jax.jit
  def grad(params, base):
    return jax.grad(lambda p: jnp.sum(jnp.square(NET.apply(made.variables(p, base), X))))(params)

  for leaf in grad(made.params, made.base)["lora"].values():
    assert not leaf["a"].any() and leaf["b"].any()  # b = 0 hides a until b has moved


def test_rank_zero_shares_everything_with_the_reference():
  """`init_state` copies what is trained; a copy here would be a whole network for nothing."""
  made = make(rank=0, targets="")
  assert set(made.params) == {"params"} and made.base == {"params": {}}
  pairs = zip(jax.tree.leaves(made.params["params"]), jax.tree.leaves(BASE), strict=True)
  assert all(one is other for one, other in pairs)


def test_rank_zero_variables_are_the_trained_tree():
  made = make(rank=0, targets="")
  doubled = jax.tree.map(lambda x: 2 * x, made.params)
  variables = made.variables(doubled, made.base)
  jax.tree.map(np.testing.assert_array_equal, variables, doubled)


def test_rank_zero_trains_the_matching_layers_and_leaves_the_others():
  made = make(rank=0, targets="to_q$")
  assert set(made.params["params"]) == {"to_q"}
  assert set(made.params["params"]["to_q"]) == {"kernel", "bias"}
  doubled = jax.tree.map(lambda x: 2 * x, made.params)
  variables = made.variables(doubled, made.base)
  expected = {**BASE, "to_q": jax.tree.map(lambda x: 2 * x, BASE["to_q"])}
  jax.tree.map(np.testing.assert_array_equal, variables, {"params": expected})


def test_the_key_decides_the_adapters():
  one, same = make(), make()
  jax.tree.map(np.testing.assert_array_equal, one.params, same.params)
  other = policy.make_policy(BASE, jax.random.key(3), **LORA)
  assert (other.params["lora"]["to_q"]["a"] != one.params["lora"]["to_q"]["a"]).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_targets_that_match_nothing_are_an_error(rank):
  with pytest.raises(ValueError, match="targets 'to_z' match none of 3 layers"):
    make(rank=rank, targets="to_z")


def test_a_negative_rank_is_an_error():
  with pytest.raises(ValueError, match="rank of at least 1, got -1"):
    make(rank=-1)
