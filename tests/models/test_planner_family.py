"""The planner family: the contract of a model without text, images or an autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxalign.diffusion import guidance
from jaxalign.models.adapters import lora, policy
from jaxalign.models.families import initialization, planner
from jaxalign.models.networks import temporal
from jaxalign.worlds import planner as world

CONFIG = temporal.TemporalConfig(horizon=6, width=8, num_layers=2, time_width=4, channel_width=12)
RECORDS = world.records("test")[:3]


@pytest.fixture(scope="module")
def model():
  params = initialization.random_params(jax.random.key(0), planner.param_shapes(CONFIG))
  return planner.build(CONFIG, params)


@pytest.fixture(scope="module")
def inputs(model):
  """x_t, t and cond of three records."""
  x_t = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
  t = np.array([1.0, 400.0, 1000.0], np.float32)
  return x_t, t, model.condition({}, model.tokenize(RECORDS))


def variables(model):
  return {"params": model.params["denoiser"]}


def test_tokens_hold_the_ends_and_say_that_they_are_given(model):
  tokens = model.tokenize(RECORDS)
  assert {name: leaf.shape for name, leaf in tokens.items()} == {
    "start": (3, 2), "goal": (3, 2), "given": (3, 1)
  }  # fmt: skip
  np.testing.assert_allclose(tokens["goal"][2], RECORDS[2]["goal"])
  assert tokens["given"].all()
  assert jax.tree.structure(model.empty) == jax.tree.structure(tokens)
  assert not any(leaf.any() or leaf.shape[0] != 1 for leaf in jax.tree.leaves(model.empty))
  with pytest.raises(ValueError, match='record 3: expected a "goal" of two numbers, found none'):
    model.tokenize([*RECORDS, {"start": (0.0, 0.0)}])
  assert model.describe({"start": (-0.78, 0.2), "goal": (1, 0)}) == "(-0.78, 0.20) to (1.00, 0.00)"


def test_samples_are_plans(model):
  assert model.latent_shape == model.sample_shape == (6, 2)
  plans = np.ones((2, 6, 2), np.float32)
  model.modality.check(plans)
  np.testing.assert_array_equal(model.decode({}, model.encode({}, plans, jax.random.key(0))), plans)
  assert model.modality.unit == "plans" and model.prediction_type == "velocity"
  assert (np.diff(model.levels.sigma_t) > 0).all() and model.levels.num_steps == 1000


def test_the_network_depends_on_time_condition_and_every_way_point(model, inputs):
  x_t, t, cond = inputs
  denoise = jax.jit(model.denoise)
  out = denoise(variables(model), x_t, t, cond)
  assert out.shape == (3, 6, 2) and out.dtype == jnp.float32
  others = [
    (x_t, t + 100.0, cond),
    (x_t, t, {**cond, "start": cond["start"] + 0.1}),
    (x_t, t, {**cond, "goal": cond["goal"] + 0.1}),
    (x_t, t, {**cond, "given": 0 * cond["given"]}),
  ]
  for other in others:
    change = np.abs(denoise(variables(model), *other) - out)
    assert (change.max(axis=(1, 2)) > 1e-5).all()
  first = jax.tree.map(lambda leaf: leaf[:1], cond)
  of_x = jax.jacobian(lambda x: model.denoise(variables(model), x, t[:1], first)[0])
  jacobian = jax.jit(of_x)(x_t[:1])
  assert (np.abs(jacobian[:, :, 0]).max(axis=(1, 3)) > 0).all()  # mixed along time
  # Examples do not see each other.
  alone = denoise(variables(model), x_t[:1], t[:1], first)
  np.testing.assert_allclose(alone, out[:1], rtol=1e-5, atol=1e-6)


def test_guidance_doubles_the_batch_with_the_masked_condition(model, inputs):
  x_t, t, cond = inputs
  empty = model.condition({}, model.empty)
  guided = guidance.classifier_free(model.denoise, 2.0)
  found = jax.jit(guided)(variables(model), x_t, t, guidance.Guided(cond, empty))
  masked = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), empty)
  with_, without = (jax.jit(model.denoise)(variables(model), x_t, t, c) for c in (cond, masked))
  np.testing.assert_allclose(found, without + 2.0 * (with_ - without), rtol=1e-4, atol=1e-5)


def test_lora_changes_nothing_at_first_and_its_gradient_reaches_every_layer(model, inputs):
  x_t, t, cond = inputs
  params = model.params["denoiser"]
  made = policy.make_policy(params, jax.random.key(1), rank=2, alpha=2.0, targets="")
  adapted = {"/".join(path) for path, _ in lora.adaptable_layers(params)}
  assert len(adapted) == 4 + 2 * 5  # two of the embedding, input, output, and five a block
  expected = model.denoise(variables(model), x_t, t, cond)
  found = model.denoise(made.variables(made.params, made.base), x_t, t, cond)
  np.testing.assert_array_equal(found, expected)

  def loss(trained):
    out = model.denoise(made.variables(trained, made.base), x_t, t, cond)
    return jnp.sum(jnp.square(out - 1.0))

  grads = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(made.params)["lora"])
  reached = {"/".join(path[:-1]) for path, leaf in grads.items() if np.abs(leaf).max() > 0}
  assert reached == adapted


def test_a_policy_of_all_parameters_is_the_reference_at_first(model, inputs):
  made = policy.make_policy(
    model.params["denoiser"], jax.random.key(0), rank=0, alpha=1.0, targets=""
  )
  assert not jax.tree.leaves(made.base)
  whole = made.variables(made.params, made.base)
  expected = model.denoise(variables(model), *inputs)
  np.testing.assert_array_equal(model.denoise(whole, *inputs), expected)


def test_bfloat16_is_near_and_float32_outside(model, inputs):
  params = model.params["denoiser"]
  half = planner.build(CONFIG, params, dtype="bfloat16", param_dtype="bfloat16")
  assert half.dtype == "bfloat16" and model.exact is None
  expected, found = (m.denoise(variables(model), *inputs) for m in (model, half))
  assert found.dtype == jnp.float32
  assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
  np.testing.assert_array_equal(half.exact(variables(model), *inputs), expected)
  dtypes = half.stored_dtypes(variables(model))["params"]["layers_0"]
  assert dtypes["time_in"]["kernel"] == jnp.bfloat16 and dtypes["norm1"]["scale"] == jnp.float32
  with pytest.raises(ValueError, match=r"param_dtype: expected float32.*\n.*set both"):
    planner.open_model("planner", param_dtype="bfloat16")


def test_a_saved_model_opens_to_the_same_bits(model, tmp_path):
  model.files.save(model.params, tmp_path)
  names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
  assert names == {
    "model_index.json", "denoiser/config.json",
    "denoiser/diffusion_pytorch_model.safetensors",
  }  # fmt: skip
  again = planner.open_model(tmp_path)
  assert again.latent_shape == (6, 2)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), again.params, model.params
  )
  with pytest.raises(ValueError, match="expected params of the denoiser, found none"):
    model.files.save({}, tmp_path)
  (tmp_path / "denoiser" / "config.json").write_text('{"horizon": 6}')
  with pytest.raises(ValueError, match="expected dim of at least 1, found None"):
    planner.open_model(tmp_path)


@pytest.mark.parametrize("section", [
  dict(transition="euler"),
  dict(transition="flow_sde", noise_level=0.7),
  dict(transition="dance_sde", eta=0.3),
  dict(transition="cps", noise_level=0.5),
  dict(transition="ddim", eta=1.0),
])  # fmt: skip
def test_any_transition_on_steps_of_equal_size(model, section):
  table = model.make_process(num_steps=5, **section).table
  np.testing.assert_allclose(table.sigma_t, [1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
  np.testing.assert_allclose(table.sigma_s[-1], 0.0)
