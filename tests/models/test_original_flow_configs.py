"""Configs that the tensors of original files tell, of small and of published ones."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from original_flow_files import MODULES, changed, made, without

from jaxalign.models.networks import flux1_transformer, flux2_transformer, sd3_transformer
from jaxalign.models.weights import original_flux, original_sd3, safetensors_io

PREFIX = "model.diffusion_model."
NAMES = {"sd3": original_sd3.sd3, "flux1": original_flux.flux1, "flux2": original_flux.flux2}
CONFIGS = {
  "sd3": (original_sd3.sd3_config, sd3_transformer.SD3Config),
  "flux1": (original_flux.flux1_config, flux1_transformer.FluxConfig),
  "flux2": (original_flux.flux2_config, flux2_transformer.Flux2Config),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_config_of_a_small_file(name):
  kind, true, _, file = made(name)
  config, parsed = CONFIGS[kind]
  for prefix in ("", PREFIX):
    found = config({prefix + name: tensor for name, tensor in file.items()})
    assert found["_class_name"] == true["_class_name"]
    assert parsed.from_dict(found) == parsed.from_dict(true)
  for other in CONFIGS.keys() - {kind}:
    with pytest.raises(ValueError, match=r"the transformer of a .*, found no \w+") as error:
      CONFIGS[other][0](file)
    assert "\n" not in str(error.value)


NORMALIZED = {"qk_norm": "rms_norm"}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
# name -> (kind, fields of config.json, tensors of the file, billions of numbers in it)
PUBLISHED = {
  "SD3-medium": ("sd3", {**MEDIUM, "pos_embed_max_size": 192}, 491, 2.08),
  "SD3.5-medium": (
    "sd3",
    {
      **MEDIUM,
      **NORMALIZED,
      "pos_embed_max_size": 384,
      "dual_attention_layers": list(range(13)),
    },
    665,
    2.47,
  ),
  "SD3.5-large": ("sd3", {**LARGE, **NORMALIZED, "pos_embed_max_size": 192}, 923, 8.15),
  "FLUX.1-dev": ("flux1", {"guidance_embeds": True}, 780, 11.90),
  "FLUX.1-schnell": ("flux1", {}, 776, 11.89),
  "FLUX.2-klein-4B": (
    "flux2",
    {**KLEIN, "joint_attention_dim": 7680, "guidance_embeds": False},
    149,
    3.88,
  ),
  "FLUX.2-dev": ("flux2", {}, 299, 32.22),
}


def traced_shapes(kind, config):
  """The shapes of our network's parameters."""

  def shape(*sizes):
    return jax.ShapeDtypeStruct((1, *sizes), jnp.float32)

  text, guidance = shape(1, config.joint_attention_dim), shape() if kind != "sd3" else None
  told = [guidance] if kind != "sd3" and config.guidance_embeds else []
  module, inputs = {
    "sd3": (sd3_transformer.SD3Transformer2DModel, lambda: [text, shape(2048)]),
    "flux1": (flux1_transformer.FluxTransformer2DModel, lambda: [text, shape(768), *told]),
    "flux2": (flux2_transformer.Flux2Transformer2DModel, lambda: [text, *told]),
  }[kind]
  x_t = shape(2, 2, config.in_channels)
  return jax.eval_shape(module(config).init, jax.random.key(0), x_t, shape(), *inputs())["params"]


def network_shapes(kind, config):
  """The same, of one traced block for all that are alike."""
  if kind == "sd3":
    dual = config.dual_attention_layers
    few = dataclasses.replace(config, num_layers=3, dual_attention_layers=(0,) if dual else ())
    like = [0 if k in dual else 1 for k in range(config.num_layers - 1)] + [2]
    blocks = {"transformer_blocks": like}
  else:
    few = dataclasses.replace(config, num_layers=1, num_single_layers=1)
    blocks = {
      "transformer_blocks": [0] * config.num_layers,
      "single_transformer_blocks": [0] * config.num_single_layers,
    }
  traced = traced_shapes(kind, few)
  shapes = {name: tree for name, tree in traced.items() if "_blocks_" not in name}
  for of, like in blocks.items():
    shapes |= {f"{of}_{k}": traced[f"{of}_{one}"] for k, one in enumerate(like)}
  return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_tell_their_config(name):
  kind, fields, count, billions = PUBLISHED[name]
  config, parsed = CONFIGS[kind]
  true = parsed.from_dict(fields)
  shapes = safetensors_io.torch_shapes(network_shapes(kind, true))
  file = {}
  for ours, source in NAMES[kind](shapes).items():
    rows = source.rows[2:] if source.rows else shapes[ours][:1]
    shape = (*rows, *shapes[ours][1:])
    assert file.setdefault(PREFIX + source.name, types.SimpleNamespace(shape=shape)).shape == shape
  assert parsed.from_dict(config(file)) == true
  assert len(file) == count
  assert sum(np.prod(one.shape) for one in file.values()) / 1e9 == pytest.approx(billions, abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_that_are_taken_to_be_alike_are(name):
  kind, fields, *_ = PUBLISHED[name]
  config = CONFIGS[kind][1].from_dict(fields)
  assert network_shapes(kind, config) == traced_shapes(kind, config)


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    ("sd3", lambda file: {}, "of a Stable Diffusion 3 .*, found no x_embedder.proj.weight"),
    ("sd3", changed("pos_embed", (1, 10, 64)), "found 10 positions, which is no square"),
    ("sd3", changed("final_layer.linear.weight", (21, 64)), "21 outputs for patches of 2 x 2"),
    ("sd3", changed("context_embedder.weight", (640,)), r"embedder.weight of shape \(640,\)"),
    ("flux1 dev", without("vector_in.in_layer.weight"), "of a FLUX.1 .*, found no vector_in"),
    ("flux1 dev", lambda f: {n: f[n] for n in f if "single_" not in n}, "found no single_blocks"),
    ("flux2 dev", changed("img_in.weight", (0, 12)), r"found img_in.weight of shape \(0, 12\)"),
    (
      "flux2 dev",
      changed("double_blocks.0.img_attn.norm.query_norm.scale", 64),
      "found 128 channels in heads of 64, not of 128",
    ),
  ],
)
def test_what_does_not_look_like_one_is_refused_in_one_line(name, change, words):
  kind, _, _, file = made(name)
  with pytest.raises(ValueError, match=words) as error:
    CONFIGS[kind][0](change(file))
  assert "\n" not in str(error.value)
