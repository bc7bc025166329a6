"""Every program of every method and model, lowered for GPUs and TPUs without either.

Lowering is where a kernel refuses a shape. Nothing is compiled for those devices here; that is what
`pytest -m aot` does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from jax._src.cudnn import fused_attention_stablehlo as fused

from jaxalign import batching, placement
from jaxalign.benchmarks import workload
from jaxalign.feeds import rollouts
from jaxalign.methods import METHODS
from jaxalign.models import attention, stable_diffusion

BATCH = 2
# Odd on purpose: 63 positions and 7 tokens, in heads of 8 and 16, which cuDNN takes.
SIZES = {"sample_size": [9, 7], "block_out_channels": [16, 32]}
TOKENS = 7
PLATFORMS = ("cuda", "tpu")
# The config that a method's other sections are of, and its own arguments.
CASES = {
  "ddpo": ("ddpo", {"clip_range": 1e-4, "kl_weight": 0.1}),
  "ddpo_sf": ("ddpo", {"kl_weight": 0.0}),
  "d3po": ("d3po", {"beta": 0.1, "clip_range": 0.1}),
  "dpo": ("dpo", {"beta": 100.0, "time_weight": "half", "num_draws": 1}),
  "ipo": ("dpo", {"tau": 10.0, "time_weight": "elbo", "num_draws": 2}),
  "draft": ("draft", {"num_grad_steps": 2, "kl_weight": 0.1}),
  "draft_lv": ("draft", {"num_noises": 2}),
  "align_prop": ("draft", {"mean_grad_steps": 1.0, "std_grad_steps": 1.0, "kl_weight": 0.0}),
  "refl": ("draft", {"step_range": (0.5, 1.0), "target": 0.5}),
}
TRAINED = {
  "side": {"rank": 4, "form": "side"},
  "merged": {"rank": 4, "form": "merged"},
  "full": {"rank": 0, "targets": ""},
}


@pytest.fixture
def described(monkeypatch):
  """`described("cuda")`: layers, and JAX's questions about cuDNN, are answered for that device."""

  def answer(platform):
    gpu = platform == "cuda"
    monkeypatch.setattr(placement, "platform", lambda: "gpu" if gpu else platform)
    monkeypatch.setattr(placement, "compute_capability", lambda: (9, 0) if gpu else (0, 0))
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda found: found == "9.0")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)

  return answer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """The small models of every kind, with odd sizes, that compute in bfloat16."""

  def make(kind):
    configs = {name: dict(config) for name, config in small_models.KINDS[kind].items()}
    configs["unet"] |= SIZES
    for name in ("text_encoder", "text_encoder_2"):
      if name in configs:
        configs[name]["max_position_embeddings"] = TOKENS
    folder = tmp_path_factory.mktemp(kind)
    tokenizers = {"tokenizer_folder": small_models.write_tokenizer(folder / "tokenizer")}
    if "text_encoder_2" in configs:
      tokenizers["tokenizer_2_folder"] = small_models.write_tokenizer(folder / "tokenizer_2")
    model = stable_diffusion.build(**configs, **tokenizers)
    return model.with_params(model.init_params(jax.random.key(0)))

  return {kind: make(kind) for kind in small_models.KINDS}


def make_work(model, method="ddpo", trained="side", dtype="bfloat16"):
  name, kwargs = CASES[method]
  config = workload.load_config(name)
  config.unlock()
  config.method = {"name": method, **kwargs}
  config.lora.update(TRAINED[trained])
  config.process.num_steps = 3
  config.guidance.scale = 5.0
  if name == "draft":
    config.reward.names = ("device_jobs:soft_brightness",)
  elif "reward" in config:
    del config["reward"]  # on the host
  return workload.make(config, model.with_compute(dtype=dtype, remat="none"))


def token_ids(sys):
  return jax.ShapeDtypeStruct((BATCH, *sys.model.networks.text.ids_shape), np.int32)


def sampled_of(work):
  sys = work.system
  args = (work.state.params, work.frozen, token_ids(sys), 0, 0, 0, None)
  return args, jax.eval_shape(sys.sample_fn, *args)


def update_program(work):
  """The update of a method on two slices, `(function, arguments)`."""
  chosen = np.zeros((2, BATCH), np.int32)
  if work.method.data == "pairs":
    data, _ = workload.pairs(work, BATCH)
  elif work.method.data == "prompts":
    data, _ = workload.prompts(work, BATCH)
  else:
    _, sampled = sampled_of(work)
    data = (jax.eval_shape(rollouts.collect, [(sampled.rollout, sampled.cond)]),)
    if work.method.data == "rollout_pairs":
      data += (np.zeros((BATCH, 2), np.int32),)
    data += (np.ones(BATCH, np.float32),)
    chosen = batching.Selection(chosen, chosen, chosen == 0)
  return work.update_fn, (work.state, work.frozen, data, chosen, 0, 0, 0)


def sampling_programs(work):
  """Everything else that a run and its evaluation compile, by name."""
  sys = work.system
  args, sampled = sampled_of(work)
  images = jax.ShapeDtypeStruct((BATCH, *sys.model.image_size, 3), np.uint8)
  return {
    "rollout": (sys.sample_fn, args),
    "condition": (sys.condition_fn, (work.frozen, token_ids(sys))),
    "kl": (sys.kl_fn, (work.state.params, work.frozen, sampled)),
    "encode": (sys.encode_fn, (work.frozen, images, 0, 0, 0)),
    "decode": (
      placement.jit(sys.parts.decode, sys.mesh),
      (work.frozen, jax.ShapeDtypeStruct((BATCH, *sys.model.latent_shape), jnp.float32)),
    ),
  }


def lower(program, platform):
  function, args = program
  return function.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_no_method_is_left_out():
  assert set(CASES) == set(METHODS)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_of_every_method(method, platform, models, described):
  described(platform)
  text = lower(update_program(make_work(models["sd1"], method)), platform)
  assert ("__cudnn$fmhaSoftmaxBackward" in text) == (platform == "cuda")


@pytest.mark.parametrize("trained", ["merged", "full"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_update_of_every_policy(trained, platform, models, described):
  described(platform)
  text = lower(update_program(make_work(models["sd1"], "dpo", trained)), platform)
  assert ("__cudnn$fmhaSoftmaxBackward" in text) == (platform == "cuda")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", [kind for kind in small_models.KINDS if kind != "pix2pix"])
def test_all_programs_of_every_family(kind, platform, models, described):
  """pix2pix needs an image beside the prompt: it is sampled from Python only, see below."""
  described(platform)
  work = make_work(models[kind], "ddpo")
  programs = {"update": update_program(work), **sampling_programs(work)}
  texts = {name: lower(program, platform) for name, program in programs.items()}
  for name in ("update", "rollout", "kl"):
    assert ("__cudnn$fmhaSoftmax" in texts[name]) == (platform == "cuda"), name


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_network_that_reads_an_image(platform, models, described):
  described(platform)
  model = models["pix2pix"].with_compute(dtype="bfloat16", remat="none")
  x_t = jax.ShapeDtypeStruct((BATCH, *model.latent_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((BATCH,), jnp.float32)
  ids = jax.ShapeDtypeStruct((BATCH, TOKENS), np.int32)
  cond = {**jax.eval_shape(model.encode_text, model.params, ids), "image": x_t}
  variables = {"params": model.params["unet"]}
  text = lower((jax.jit(model.denoise), (variables, x_t, t, cond)), platform)
  assert ("__cudnn$fmhaSoftmax" in text) == (platform == "cuda")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_float32_and_a_learned_reward(platform, models, described):
  """In float32 attention is XLA's own on accelerators; the reward is the shipped one."""
  described(platform)
  work = make_work(models["sd1"], "ddpo", dtype="float32")
  for program in (update_program(work), sampling_programs(work)["rollout"]):
    assert "__cudnn$fmhaSoftmax" not in lower(program, platform)
  from jaxalign.rewards import learned

  reward = learned.make_shapes()
  features = reward.encode([{"prompt": "a red circle"}] * BATCH)
  images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32)
  score = jax.jit(jax.grad(lambda x, f: reward.score(reward.params, x, f).sum()))
  lower((score, (images, features)), platform)


def test_the_crash_of_odd_lengths_is_seen_when_it_is_put_back(models, described, monkeypatch):
  def unpadded(query, key, value, mask=None):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")

  described("cuda")
  monkeypatch.setattr(attention, "cudnn", unpadded)
  with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
    lower(update_program(make_work(models["sd1"], "dpo")), "cuda")
