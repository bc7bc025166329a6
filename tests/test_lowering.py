"""Every program of every method and model, lowered for GPUs and TPUs without either.

Lowering is where a kernel refuses a shape. Nothing is compiled for those devices here; that is what
`pytest -m aot` does. Tracing takes most of the time, so that a program is traced once, as for a
GPU, and lowered for both; one test makes sure that a trace for TPUs would give the same. How many
programs there are, and the seconds that they take, are printed at the end (`pytest -s`).
"""

import dataclasses
import functools
import pathlib
import re
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import odd_flows
import optax
import programs
import pytest
import small_flows
import small_models
import toy_policy

from jaxalign import methods, steering, system
from jaxalign.distributed import sharding
from jaxalign.labels import advantages, pairs
from jaxalign.models import encoding, families
from jaxalign.models.families import clip_dual, stable_diffusion
from jaxalign.models.networks import attention, layers, rematerialization
from jaxalign.recipes import shapes_model, shapes_reward
from jaxalign.rewards import DEVICE_REWARDS
from jaxalign.training import reward_model, self_check, state
from jaxalign.training.feeds import Program, base, online

PACKAGE = pathlib.Path(methods.__file__).parents[1]
PLATFORMS = ("cuda", "tpu")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("
# Programs of the package by file, and how many: each of them is lowered here.
JITTED = {
  "distributed/placement.py": 1,  # the one that all others with a mesh go through
  "evaluation/precision.py": 1,
  "models/encoding.py": 1,
  "recipes/shapes_model.py": 1,
  "rewards/learned.py": 1,
  "rewards/scoring.py": 1,
  "sample.py": 1,
  "system.py": 4,
  "training/feeds/records.py": 1,
  "training/feeds/online.py": 2,
  "training/feeds/stored.py": 1,
  "training/fit.py": 1,
  "training/reward_model.py": 2,
  "training/self_check.py": 1,
  "training/state.py": 2,
  "training/update.py": 1,
}
NOT_OF_A_RUN = {"aot", "benchmarks"}
# Heads' sizes that cuDNN is asked for, by compute capability; 512 is the autoencoder's.
SIZES = (40, 64, 80, 160, 256, 512)
FUSED = {(9, 0): {40, 64, 80, 160, 256}, (8, 0): {40, 64, 80}, (7, 5): set()}

lowered: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def counted():
  began = time.perf_counter()
  yield
  print(f"\nlowered {len(lowered)} programs in {time.perf_counter() - began:.0f} s")


@pytest.fixture
def gpu():
  """Traces are for an H100; the patch is undone with it."""
  with programs.described("gpu") as patch:
    yield patch


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
  """`model_of(kind)`: one of the small models, made once."""
  return functools.cache(lambda kind: programs.model(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def least(model_of):
  return model_of(programs.LEAST)


def lower(program: Program, platforms=PLATFORMS) -> jax.stages.Lowered:
  """Lowers for all of them, and returns what it is for the first."""
  traced = program.function.trace(*program.args)
  made = [traced.lower(lowering_platforms=(platform,)) for platform in platforms]
  lowered.extend(f"{program.name} for {platform}" for platform in platforms)
  return made[0]


def assert_fused(found: jax.stages.Lowered, *, backward):
  text = found.as_text()
  assert FORWARD in text
  assert (BACKWARD in text) == backward


def shapes_of(found: jax.stages.Lowered):
  return [leaf.shape for leaf in jax.tree.leaves(found.out_info)]


def jitted(name, function, *args):
  return Program(name, jax.jit(function), args)


def array(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_no_method_no_data_and_no_program_is_left_out():
  assert set(programs.METHODS) == set(methods.METHODS)
  assert set(programs.SAMPLERS) == set(steering.SAMPLERS)
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    name = path.relative_to(PACKAGE)
    count = len(re.findall(r"(?<!def )(?<![`\w.])(?:jax|placement)\.jit\b", path.read_text()))
    if count and name.parts[0] not in NOT_OF_A_RUN:
      found[name.as_posix()] = count
  assert found == JITTED, "lower the new program in this file, and count it in JITTED"


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_update_of_every_method(method, least, gpu):
  assert_fused(lower(programs.update(programs.make_work(least, method))), backward=True)


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_every_program_of_every_family(kind, model_of, gpu):
  model = model_of(kind)
  if model.networks.unet.config.in_channels > model.latent_shape[-1]:
    lower_with_image(model)  # it is sampled from Python only
    return
  work = programs.make_work(model)
  found = {one.name: lower(one) for one in [programs.update(work), *programs.others(work)]}
  of_system = {one.name for one in dataclasses.fields(system.System) if one.name.endswith("_fn")}
  assert of_system <= found.keys()
  assert_fused(found["update"], backward=True)
  assert_fused(found["sample_fn"], backward=False)
  assert_fused(found["kl_fn"], backward=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  with odd_flows.written(tmp_path_factory) as write:
    yield write


@pytest.mark.parametrize("kind", small_flows.KINDS)
def test_every_program_of_a_flow_transformer(kind, gpu, written):
  """15 tokens of an image, 8 of each CLIP's and T5's text: together an odd number."""
  folder = written(kind)
  options = {"image_size": (20, 12), "text_length": 8, "dtype": "bfloat16", "shapes_only": True}
  with warnings.catch_warnings(action="ignore"):
    model = families.open_model(folder, **options)
  work = programs.make_work(model)
  found = {one.name: lower(one) for one in [programs.update(work), *programs.others(work)]}
  assert_fused(found["update"], backward=True)
  assert_fused(found["sample_fn"], backward=False)
  encoders = {name: tree for name, tree in model.params.items() if name.startswith("text")}
  narrow = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=jnp.bfloat16), encoders)
  lower(jitted("encode once", encoding.narrow(model.condition), narrow, model.empty))


def lower_with_image(model):
  """The network that reads an image beside the latents, and its gradient; and the autoencoder."""
  x_t, t = array(2, *model.latent_shape), array(2)
  ids = array(2, *model.networks.text.ids_shape, dtype=np.int32)
  cond = {**jax.eval_shape(model.encode_text, model.params, ids), "image": x_t}

  def loss(params, x_t, t, cond):
    return jnp.mean(model.denoise({"params": params}, x_t, t, cond))

  args = (model.params["unet"], x_t, t, cond)
  assert_fused(lower(jitted("denoise", loss, *args)), backward=False)
  assert_fused(lower(jitted("its gradient", jax.grad(loss), *args)), backward=True)
  lower(jitted("text", model.encode_text, model.params, ids))
  lower(jitted("decode", model.decode, model.params["vae"], x_t))
  images = array(2, *model.image_size, 3)
  lower(jitted("encode", model.encode_images, model.params["vae"], images))


@pytest.mark.parametrize("trained", [name for name in programs.TRAINED if name != "side"])
def test_other_policies(trained, least, gpu):
  """The adapter beside its layer is every other test's."""
  assert_fused(lower(programs.update(programs.make_work(least, trained=trained))), backward=True)


@pytest.mark.parametrize("remat", [name for name in rematerialization.REMAT if name != "none"])
def test_blocks_that_are_computed_again(remat, least, gpu):
  model = least.with_compute(dtype="bfloat16", remat=remat, param_dtype="bfloat16")
  assert_fused(lower(programs.update(programs.make_work(model))), backward=True)


@pytest.mark.parametrize("sampler", steering.SAMPLERS)
def test_the_program_of_every_sampler(sampler, least, gpu):
  assert_fused(lower(programs.steered(programs.make_work(least), sampler)), backward=False)


def test_the_program_that_scores(least, gpu):
  assert "is_finite" in lower(programs.scored(programs.make_work(least))).as_text()


def test_float32_in_pieces(least, gpu):
  """In float32 attention is XLA's own on accelerators, for some queries at a time."""
  gpu.setattr(attention, "MAX_LOGITS", 2**10)
  work = programs.make_work(least.with_compute(dtype="float32", remat="none"))
  for program in (programs.update(work), programs.rollout(work)):
    text = lower(program).as_text()
    assert "__cudnn$fmha" not in text and "bf16" not in text


def test_what_commands_and_options_run(least, gpu):
  """Given noise; what rounding alone makes; images decoded in bfloat16, few at a time, in tiles."""
  work = programs.make_work(least)
  assert_fused(lower(programs.sample(work)), backward=False)
  assert_fused(lower(programs.floor(work)), backward=False)
  lean = dataclasses.replace(least.networks, decode_batch=1, decode_tile=4, vae_dtype="bfloat16")
  work = programs.make_work(dataclasses.replace(least, networks=lean))
  decode = next(one for one in programs.others(work) if one.name == "decode")
  assert "bf16" in lower(decode).as_text()


def products(text):
  """The types of all products and convolutions, and what is called by name."""
  found = re.findall(r"stablehlo\.(dot_general|convolution).* : (.*)", text)
  return sorted(found) + sorted(re.findall(r"custom_call @[\w$]+", text))


def test_a_trace_for_tpus_computes_the_same(least):
  """But for zeros that the other branch's residuals leave behind."""
  found = []
  for platform in ("gpu", "tpu"):
    with programs.described(platform):
      work = programs.make_work(least)
      found.append(products(lower(programs.update(work), ("tpu",)).as_text()))
  assert found[0] == found[1] and len(found[0]) > 50


def test_ampere_computes_large_heads_without_cudnn(tmp_path):
  """Those of 160, which the lowest resolutions of 1.x have, and here the middle block."""
  with programs.described("gpu", (8, 0)):
    model = programs.model("sd1", tmp_path, block_out_channels=[8, 160])
    text = lower(programs.rollout(programs.make_work(model)), ("cuda",)).as_text()
  assert text.count(FORWARD) == 2 * 3  # to positions and to a text, of three transformers in four


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capability", FUSED)
def test_attention_of_odd_lengths_and_its_gradient(capability, masked, monkeypatch):
  """Every size of heads that a published model has, of 63 positions to a text."""
  monkeypatch.setattr(attention, "MAX_LOGITS", 2**10)
  name = "ScaleBiasSoftmax" if masked else "Softmax"

  def loss(query, key, mask):
    return jnp.sum(layers.attention(query, key, key, mask if masked else None))

  for size in SIZES:
    query, key = (array(2, length, 2, size, dtype=jnp.bfloat16) for length in (63, 7))
    mask = array(1, 1, 63, 7, dtype=np.bool_)
    with programs.described("gpu", capability):
      program = jitted("attention", jax.grad(loss, (0, 1)), query, key, mask)
      text = lower(program).as_text()
    fused = size in FUSED[capability]
    assert (f"__cudnn$fmha{name}(" in text) == fused, size
    assert (f"__cudnn$fmha{name}Backward(" in text) == fused, size


@pytest.mark.parametrize("name", DEVICE_REWARDS)
def test_every_reward_of_the_device_and_its_gradient(name, gpu):
  reward = DEVICE_REWARDS[name](shapes_only=True)
  world = name.split("_")[0]
  record = {"prompt": "a red circle", "start": (-0.9, 0.0), "goal": (0.9, 0.0)}
  shape = {"gaussian": (2,), "planner": (16, 2)}.get(world, (18, 14, 3))
  args = (reward.params, array(2, *shape), reward.encode([record] * 2))

  def total(params, samples, query):
    return jnp.sum(reward.score(params, samples, query))

  assert shapes_of(lower(jitted(name, reward.score, *args))) == [(2,)]
  gradient = lower(jitted(f"gradient of {name}", jax.grad(total, 1), *args))
  assert shapes_of(gradient) == [args[1].shape]
  assert "stablehlo.multiply" in gradient.as_text()  # else it would be a constant


def test_what_feeds_and_states_are_made_by(least, gpu):
  work = programs.make_work(least)
  sampled = jax.eval_shape(work.system.sample_fn, *programs.rollout(work).args)
  mesh = work.system.mesh
  placed = online.collected_shardings("step", mesh)
  collect = jax.jit(online.collect, out_shardings=placed)
  assert "stablehlo.concatenate" in lower(Program("collect", collect, ([sampled] * 2,))).as_text()
  stack = jax.jit(base.stack, out_shardings=sharding.batch(mesh, axis=1))
  stacked = lower(Program("stack", stack, ([(array(2, 3), array(2))] * 2,)))
  assert shapes_of(stacked) == [(2, 2, 3), (2, 2)]
  tx = optax.adam(1.0)

  def init(params):
    step = jnp.zeros((), jnp.int32)
    return state.TrainState(step, params, tx.init(params), {}, {}, {"ema": params}, None)

  arrays = len(jax.tree.leaves(work.system.policy.params))
  made = lower(jitted("state", init, work.system.policy.params))
  assert len(shapes_of(made)) == 2 + 4 * arrays  # two counters; parameters, a copy and two moments
  ended = state.jit_end(mesh, sharding.replicated(mesh))
  fresh = jax.eval_shape(init, work.system.policy.params)
  text = lower(Program("end of an iteration", ended, (fresh, {"ema": 0.5}))).as_text()
  assert text.count("stablehlo.multiply") == 2 * arrays  # both sides of every average
  reached = self_check.make_reached_fn(mesh)
  found = lower(Program("gradients that arrive", reached, (work.system.policy.params["lora"],)))
  assert shapes_of(found) == [()] * arrays and found.as_text().count("stablehlo.or") == arrays


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_every_estimator_of_advantages(name, gpu):
  kwargs = {
    "per_prompt": {"buffer_size": 4, "min_count": 2, "epsilon": 1e-6},
    "group": {"epsilon": 1e-4, "ddof": 0},
    "leave_one_out": {},
  }.get(name, {"epsilon": 1e-4})
  made = advantages.make(name, limit=5.0, **kwargs)
  estimate = jitted(name, made.estimate, made.init(3), toy_policy.scores_of(np.zeros((2, 2))))
  assert "stablehlo.subtract" in lower(estimate).as_text()  # of a mean


@pytest.mark.parametrize("label", [pairs.best_and_worst])
def test_every_label(label, gpu):
  key = jax.eval_shape(lambda: jax.random.key(0))
  program = jitted("label", label, None, toy_policy.scores_of(np.zeros((2, 2))), key)
  assert "stablehlo.compare" in lower(program).as_text()  # of rewards


def test_what_makes_the_packaged_models(least, gpu, load_config):
  """Pretraining and the reward model: their losses' gradients, and what they encode."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  images = array(2, *least.image_size, 3, dtype=np.uint8)
  ids = array(2, *least.networks.text.ids_shape, dtype=np.int32)
  x_0 = array(2, *least.latent_shape)
  model = stable_diffusion.as_model(least)
  clip = clip_dual.load(PACKAGE / "worlds" / "assets" / "shapes_reward", shapes_only=True)
  seen = array(2, 64, 64, 3, dtype=np.uint8)
  captions = array(2, clip.tokenize([""]).shape[-1], dtype=np.int32)
  of_text = jax.eval_shape(clip.text_features, clip.params, captions)
  config = load_config("reward_model")
  losses = {
    "autoencoder": (
      shapes_model.make_autoencoder_loss(least.networks, kl_weight=1e-6),
      least.params["vae"],
      images,
    ),
    "denoiser": (
      shapes_model.make_denoising_loss(model, logit_mean=0.0, logit_std=1.0),
      model.params,
      (x_0, ids),
    ),
    "warm start": (
      shapes_reward.make_contrastive_loss(clip, **config.warm_start.augmentation),
      clip.params,
      (seen, captions, array(2, 2, dtype=np.bool_)),
    ),
    "preferences": (
      reward_model.make_preference_loss(clip),
      clip.params,
      (array(2, 2, 64, 64, 3, dtype=np.uint8), of_text, array(2)),
    ),
  }  # fmt: skip
  for name, (loss, params, batch) in losses.items():
    found = lower(jitted(name, jax.grad(loss, has_aux=True), params, batch, key))
    gradient, _ = found.out_info
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, params)
    assert len(products(found.as_text())) > 20
  moments = lower(jitted("moments", least.vae_moments, least.params["vae"], array(*images.shape)))
  of_text = lower(jitted("captions", clip.text_features, clip.params, captions))
  assert products(moments.as_text()) and products(of_text.as_text())


def test_the_crash_of_odd_lengths_is_seen_when_it_is_put_back(least, gpu):
  def unpadded(query, key, value, mask=None):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")

  gpu.setattr(attention, "cudnn", unpadded)
  work = programs.make_work(least)
  lower(programs.rollout(work), ("cuda",))  # which needs no gradient
  with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 63, KV"):
    lower(programs.update(work), ("cuda",))
