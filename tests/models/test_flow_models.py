"""Flow transformers as models: folders read and written, and diffusers' pipelines beside them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_flows

from jaxalign import system
from jaxalign.diffusion import guidance
from jaxalign.models import families

SIZE = (8, 16)  # in pixels, not square
PROMPTS, NEGATIVE = ["a cat", "dog a red"], "dog"
NUM_STEPS, SCALE, TRUE_SCALE, LENGTH = 3, 2.5, 1.5, 20
# What diffusers' pipeline of a kind is told beside prompts and noise, and what our guidance is.
CALLS = {
  "sd3": {"guidance_scale": SCALE, "negative_prompt": NEGATIVE, "max_sequence_length": LENGTH},
  "flux1": {
    "guidance_scale": SCALE,
    "true_cfg_scale": TRUE_SCALE,
    "negative_prompt": NEGATIVE,
    "max_sequence_length": LENGTH,
  },
  "flux2": {"guidance_scale": SCALE, "max_sequence_length": LENGTH},  # no other negative prompt
  "z_image": {"guidance_scale": SCALE, "negative_prompt": NEGATIVE, "max_sequence_length": LENGTH},
  "qwen_image": {"true_cfg_scale": SCALE, "negative_prompt": NEGATIVE},
}
GUIDANCE = {"flux1": {"scale": SCALE, "true_scale": TRUE_SCALE}}


@pytest.fixture(scope="module", params=small_flows.KINDS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
  return small_flows.write(kind, tmp_path_factory.mktemp(kind) / "model")


def open_quietly(folder, **options):
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*assumed or corrected")
    return families.open_model(folder, **{"text_length": LENGTH, "image_size": SIZE, **options})


def read(model):
  return jax.tree.map(np.asarray, dict(model.params))


def test_a_saved_folder_is_read_to_the_bit(folder, tmp_path):
  model = open_quietly(folder)
  again = tmp_path / "again"
  model.files.save(read(model), again)
  found = {
    path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()
  }
  expected = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  assert found == expected
  shapes = open_quietly(folder, shapes_only=True).params
  assert jax.tree.map(np.shape, dict(shapes)) == jax.tree.map(np.shape, read(model))


def test_diffusers_makes_the_same_images(folder, kind):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  absent = [name for name in ("text_encoder_3", "tokenizer_3") if not (folder / name).exists()]
  none = dict.fromkeys(absent) if kind.startswith("sd3") else {}  # it wants to be told
  pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **none)
  pipeline.set_progress_bar_config(disable=True)
  family = kind.partition("_without")[0]
  model = open_quietly(folder)
  sys = system.from_model(
    model,
    seed=0,
    lora=system.NO_LORA,
    process={"num_steps": NUM_STEPS, "transition": "euler"},
    guidance=GUIDANCE.get(family, {"scale": SCALE}),
  )
  sys = sys.guided_from({"prompt": NEGATIVE}) if "negative_prompt" in CALLS[family] else sys
  noise = np.random.default_rng(3).standard_normal((2, *model.latent_shape), np.float32)
  call = dict(CALLS[family])
  if "negative_prompt" in call:
    call["negative_prompt"] = [NEGATIVE] * len(PROMPTS)
  expected = pipeline(
    prompt=list(PROMPTS),  # some pipelines write into it
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=NUM_STEPS,
    latents=small_flows.latents_for_diffusers(family, noise),
    output_type="np",
    **call,
  ).images
  tokens = model.tokenize([{"prompt": prompt} for prompt in PROMPTS])
  arguments = (sys.policy.params, sys.frozen, tokens, noise, jax.random.key(0), sys.pipeline.table)
  actual = jax.jit(sys.sample)(*arguments).samples
  assert actual.shape == expected.shape == (2, *SIZE, 3)
  assert np.ptp(expected) > 0.3
  np.testing.assert_allclose(actual, expected, atol=2e-3)


def test_bfloat16_is_near_float32_and_frozen_weights_are_stored_in_it(folder, kind):
  full = open_quietly(folder)
  half = open_quietly(folder, dtype="bfloat16", param_dtype="bfloat16")
  assert (full.dtype, half.dtype) == (None, "bfloat16") and full.exact is None
  params = read(full)
  variables = {"params": params["denoiser"]}
  x_t = np.random.default_rng(0).standard_normal((1, *full.latent_shape), np.float32)
  cond = jax.jit(full.condition)(params, full.tokenize([{"prompt": "a cat"}]))
  t = np.array([700.0], np.float32)
  expected, found, exact = (
    np.asarray(jax.jit(guidance.told(denoise, **full.guidance))(variables, x_t, t, cond))
    for denoise in (full.denoise, half.denoise, half.exact)
  )
  np.testing.assert_array_equal(exact, expected)
  assert found.dtype == np.float32
  assert 0.0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
  stored = half.stored_dtypes(variables)["params"]
  by_name = {}
  for path, dtype in jax.tree_util.tree_leaves_with_path(stored):
    by_name.setdefault(path[-1].key, set()).add(jnp.dtype(dtype))
  assert by_name.pop("kernel") == {jnp.dtype(jnp.bfloat16)}
  assert by_name.get("scale", {jnp.dtype(jnp.float32)}) == {jnp.dtype(jnp.float32)}
  assert by_name.get("pos_embed", {jnp.dtype(jnp.float32)}) == {jnp.dtype(jnp.float32)}
