"""bfloat16 and rematerialisation: what they change of a run, and what they must not."""

import dataclasses
import json

import device_jobs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
import small_models

from jaxalign import system, train
from jaxalign.benchmarks import models
from jaxalign.evaluation import precision
from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import attention
from jaxalign.training import metrics


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def inputs(model, batch, size):
  x_t = normal(batch, size, size, model.latent_shape[-1])
  params = jax.tree.map(np.asarray, model.params)  # of a file, only then read
  cond = jax.jit(model.encode_text)(params, model.tokenize(["a red circle"] * batch))
  return x_t, jnp.full(batch, 500), cond


def products(jaxpr):
  """The dtypes that every matrix product and convolution of a program computes in.

  Of what depends on the platform, the default: a CPU's attention is float32.
  """
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
      found.append(eqn.invars[0].aval.dtype)
    params = dict(eqn.params)
    if params.get("branches_platforms"):
      params["branches"] = params["branches"][params["branches_platforms"].index(None)]
    for value in jax.tree.leaves(params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += products(inner)
  return found


def test_only_the_unet_computes_in_bfloat16(small_model):
  model = stable_diffusion.load(small_model, dtype="bfloat16")
  x_t, t, cond = inputs(model, 2, 8)
  assert cond["text"].dtype == jnp.float32
  variables = {"params": model.params["unet"]}
  traced = jax.make_jaxpr(model.denoise)(variables, x_t, t, cond)
  assert set(products(traced.jaxpr)) == {jnp.dtype(jnp.bfloat16)}
  traced = jax.make_jaxpr(model.decode)(model.params["vae"], x_t)
  assert set(products(traced.jaxpr)) == {jnp.dtype(jnp.float32)}


def test_bfloat16_predicts_about_the_same_and_its_gradient_is_float32(small_model):
  exact = stable_diffusion.load(small_model)
  rounded = exact.with_compute(dtype="bfloat16", remat="none")
  x_t, t, cond = inputs(exact, 2, 8)
  predictions = []
  for model in (exact, rounded):
    params = jax.tree.map(np.asarray, model.params["unet"])
    prediction = jax.jit(model.denoise)({"params": params}, x_t, t, cond)
    assert prediction.dtype == jnp.float32
    predictions.append(prediction)
  assert 0 < np.abs(predictions[1] - predictions[0]).max() < 0.05 * np.abs(predictions[0]).max()

  def loss(params):
    return jnp.mean(rounded.denoise({"params": params}, x_t, t, cond))

  grads = jax.eval_shape(jax.grad(loss), exact.params["unet"])
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@shipped.programs("sample_fn", "update")
@pytest.mark.parametrize("variant", ["", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_first_importance_ratio_is_exactly_one_in_bfloat16(
  variant, load_config, small_model, tmp_path, capsys
):
  config = load_config("ddpo", ",".join(filter(None, ["quicktest", variant])))
  config.model.update({"path": str(small_model), "dtype": "bfloat16"})
  config.reward.names = config.evaluation.rewards = ("device_jobs:brightness",)
  config.guard.gold = "device_jobs:brightness"
  train.train(config, tmp_path)
  written = metrics.read(tmp_path)
  assert [record["policy/first_ratio_max_error"] for record in written] == [0.0, 0.0]
  assert [record["policy/log_prob_gap"] for record in written] == [0.0, 0.0]
  # What rounding alone makes of a KL and a log-ratio is measured once, and reported.
  assert written[0][precision.KL] > 0 and written[0][precision.LOG_RATIO] > 0
  assert precision.KL not in written[1]
  assert precision.recorded_kl(tmp_path) == written[0][precision.KL]
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert report["kl_floor"] == written[0][precision.KL]
  assert "bfloat16: rounding alone makes log-ratios of about" in capsys.readouterr().out


@pytest.fixture
def run_preset(load_config, tmp_path):
  """`run_preset(name, model, iterations, **changes of its model)`: the metrics of a small run.

  Of enough transitions that a rare difference would be among them.
  """

  def run(name, model, iterations, form="merged", **changes):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    config = load_config(name, "quicktest")
    assert config.model.dtype == "bfloat16"
    config.num_iterations = iterations
    config.model.update({"path": str(model), **changes})
    config.lora.form = form
    config.data.source = config.evaluation.source = str(tmp_path / "prompts.txt")
    config.batch.update({"num_records": 16, "microbatch": 8, "updates_per_epoch": 2})
    config.process.num_steps = 6
    config.samples.every = config.checkpoint.every = 0
    workdir = tmp_path / "_".join([name, *changes.values()])
    train.train(config, workdir)
    return device_jobs.records(workdir)

  return run


def assert_first_ratios_are_one(written, iterations):
  assert len(written) == iterations
  assert all(record["policy/first_ratio_max_error"] == 0.0 for record in written)


@pytest.mark.slow
@pytest.mark.parametrize("name, folder", [("ddpo_sd15", "small_model"), ("ddpo_sdxl", "small_xl")])
def test_a_preset_passes_its_own_bounds_of_exactness(name, folder, run_preset, request):
  """Fifty iterations; the default suite has six, below."""
  written = run_preset(name, request.getfixturevalue(folder), 50)
  assert_first_ratios_are_one(written, 50)


def test_frozen_weights_in_bfloat16_change_no_result_of_adapters_beside_them(
  load_config, tmp_path
):
  """A merged kernel is the rounded sum of both, so that there they change its last places."""
  written = []
  for stored in ("bfloat16", "float32"):
    config = device_jobs.on_planner(load_config("ddpo_planner", "lora,quicktest"))
    config.model = {"path": "planner", "dtype": "bfloat16", "param_dtype": stored}
    config.exactness.update({"max_log_prob_gap": 1.0, "max_share": 1.0})
    config.evaluation.kl = False  # it is of updates, and a KL would be another program
    train.train(config, tmp_path / stored)
    written.append(device_jobs.records(tmp_path / stored))
  assert_first_ratios_are_one(written[0], 2)
  assert written[0] == written[1] and written[0][1]["grad/norm"] > 0


def test_rematerialisation_keeps_the_gradient_and_takes_less_memory(monkeypatch):
  monkeypatch.setattr(attention, "LOGITS_IN_CACHE", 2**16)  # or they are most of what is held
  unet = models.unet_config(
    (32,), (True,), sample_size=8, cross_attention_dim=32, attention_head_dim=2, layers_per_block=1
  )
  monkeypatch.setitem(models.CONFIGS, "one level", {**models.CONFIGS["small"], "unet": unet})
  plain = models.build("one level")
  x_t, t, cond = inputs(plain, 8, 16)

  def measure(remat):
    model = plain.with_compute(dtype="float32", remat=remat)

    def loss(params):
      return jnp.mean(jnp.square(model.denoise({"params": params}, x_t, t, cond)))

    # Without this pass a CPU's compiler, too, leaves what is to be computed late where it is.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    compiled = jax.jit(jax.grad(loss)).lower(model.params["unet"]).compile(options)
    return compiled(model.params["unet"]), compiled.memory_analysis().temp_size_in_bytes

  measured = {remat: measure(remat) for remat in ("none", "dots", "full")}
  expected, most = measured.pop("none")
  for grads, _ in measured.values():
    jax.tree.map(
      lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7),
      grads,
      expected,
    )
  assert measured["full"][1] < 0.75 * measured["dots"][1] < 0.75 * 0.7 * most


def test_images_are_decoded_in_bfloat16_where_the_model_allows_it(small_model, tmp_path):
  exact = stable_diffusion.load(small_model)
  rounded = stable_diffusion.load(small_model, vae_dtype="bfloat16")
  x_0 = normal(2, *exact.latent_shape)
  params = jax.tree.map(np.asarray, exact.params["vae"])
  images = [jax.jit(model.decode)(params, x_0) for model in (exact, rounded)]
  assert images[1].dtype == jnp.float32
  assert 0 < np.abs(images[1] - images[0]).max() < 0.05
  traced = jax.make_jaxpr(rounded.decode)(params, x_0)
  assert jnp.dtype(jnp.bfloat16) in set(products(traced.jaxpr))
  options = {"dtype": "float32", "remat": "none", "vae_dtype": "bfloat16"}
  xl = small_models.make("xl", tmp_path)
  with pytest.raises(ValueError, match=r"vae_dtype: expected float32, which the autoencoder"):
    xl.with_compute(**options)
  fixed = {**xl.configs, "vae": {**xl.configs["vae"], "force_upcast": False}}
  assert dataclasses.replace(xl, configs=fixed).with_compute(**options).networks.vae_dtype


def test_what_is_not_trained_is_stored_in_half_the_memory_but_for_norms(small_model):
  model = stable_diffusion.load(small_model, dtype="bfloat16", param_dtype="bfloat16")
  sections = {
    "process": {"transition": "ddim", "num_steps": 2, "eta": 1.0}, "guidance": {"scale": 1.0}
  }  # fmt: skip
  lora = {"rank": 2, "alpha": 2.0, "targets": "to_q$"}
  sys = system.from_model(stable_diffusion.as_model(model), seed=0, lora=lora, **sections)
  for path, leaf in jax.tree_util.tree_leaves_with_path(sys.frozen["base"]):
    norm = path[-1].key == "scale" or "norm" in path[-2].key
    assert leaf.dtype == (jnp.float32 if norm else jnp.bfloat16), path
  assert all(one is other for one, other in zip(
    jax.tree.leaves(sys.frozen["base"]), jax.tree.leaves(sys.frozen["reference"]), strict=True
  ))  # fmt: skip
  assert {leaf.dtype for leaf in jax.tree.leaves(sys.policy.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("changes, message", [
  (
    {"param_dtype": "bfloat16"},
    "model.param_dtype: expected float32, because the denoiser computes in float32",
  ),
  ({"dtype": "float16"}, "model.dtype: expected one of float32, bfloat16, got 'float16'"),
  ({"remat": "dot"}, 'model.remat: expected one of none, dots, full, got .*mean "dots"'),
])
def test_an_unknown_choice_is_refused(changes, message, small_model):
  with pytest.raises(ValueError, match=message):
    stable_diffusion.load(small_model, **changes)
