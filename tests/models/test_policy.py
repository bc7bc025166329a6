"""The split of a denoiser into trained and frozen trees, on a small network of the same layers."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.adapters import policy
from jaxalign.models.networks import layers


class Net(nn.Module):
  """A convolution and two linear layers, named as the attention of a UNet."""

  @nn.compact
  def __call__(self, x):
    x = layers.Conv(6, name="conv_in")(x)
    x = jnp.tanh(layers.Dense(5, name="to_q")(x))
    return layers.Dense(3, name="to_out_0")(x)


NET = Net()
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 7, 3), np.float32))
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


def frozen(made):
  return {"base": made.base, "reference": {"params": BASE}}


def trained(made):
  """Parameters some way from the start, adapters not zero."""
  rng = np.random.default_rng(7)
  return jax.tree.map(
    lambda x: x + np.float32(0.3) * rng.standard_normal(x.shape, np.float32), made.params
  )


def value_and_grad(made, params, frozen, dtype):
  def loss(params):
    out = NET.apply(made.variables(params, frozen["base"]), X.astype(dtype))
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [
  {}, {"targets": "conv_in"}, {"rank": 0, "targets": ""}, {"rank": 0, "targets": "to_q$"},
])
def test_made_ready_it_is_the_same_function_with_the_same_gradient(changes, dtype):
  """Casts are done before the loop instead of in it, and nothing else."""
  made = make(**changes, dtype=None if dtype == "float32" else dtype)
  params = trained(made)
  expected = value_and_grad(made, params, frozen(made), dtype)
  ready = made.ready(params, frozen(made))
  actual = value_and_grad(made, params, ready, dtype)
  # In float32 to the bit. In bfloat16 a CPU fuses casts otherwise, and rounds in other places.
  bound = 0.0 if dtype == "float32" else 0.02
  assert_close = functools.partial(np.testing.assert_allclose, rtol=bound, atol=bound)
  jax.tree.map(assert_close, actual, expected)
  reference = jax.tree.leaves(ready["reference"])
  assert {leaf.dtype for leaf in reference} == {jnp.dtype(dtype)}
  assert {leaf.dtype for leaf in jax.tree.leaves(actual[1])} == {jnp.dtype("float32")}


def test_merged_adapters_are_the_side_path_in_one_kernel():
  side, merged = make(), make(form="merged")
  params = trained(side)
  ready = merged.ready(params, frozen(merged))
  assert set(ready["base"]["ready"]) == {"to_q", "to_out_0"}
  expected = value_and_grad(side, params, frozen(side), "float32")
  actual = value_and_grad(merged, params, ready, "float32")
  assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(assert_close, actual, expected)


def test_a_merged_convolution_keeps_its_side_path():
  side, merged = make(targets="conv_in"), make(targets="conv_in", form="merged")
  params = trained(side)
  expected = value_and_grad(side, params, frozen(side), "float32")
  actual = value_and_grad(merged, params, merged.ready(params, frozen(merged)), "float32")
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_gradient_of_a_merged_kernel_is_never_formed():
  """No product of the compiled gradient has a kernel's shape but the one that merges."""
  made = make(form="merged")

  def grad(params, base):
    ready = made.ready(params, {"base": base, "reference": {"params": BASE}})
    return jax.grad(
      lambda p: jnp.sum(jnp.square(NET.apply(made.variables(p, ready["base"]), X)))
    )(params)

  text = jax.jit(grad).lower(trained(made), made.base).compile().as_text()
  assert len(re.findall(r"= f32\[6,5\]\S* dot\(|= f32\[5,6\]\S* dot\(", text)) == 1


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match=r'config.lora.form: expected .* got .merge.*mean "merged"'):
    make(form="merge")


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("changes", [{}, {"rank": 0, "targets": ""}])
def test_strength_goes_from_the_reference_to_what_was_trained(changes, strength):
  made = make(**changes)
  params = trained(made)
  actual = apply(made.variables(made.at_strength(params, strength), made.base), X)
  ends = [apply(made.variables(p, made.base), X) for p in (made.params, params)]
  if strength in (0.0, 1.0):
    np.testing.assert_allclose(actual, ends[int(strength)], rtol=1e-5, atol=1e-5)
  else:
    assert not np.allclose(actual, ends[0]) and not np.allclose(actual, ends[1])
