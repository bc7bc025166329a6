"""The networks that are measured, with random weights: no file is needed for any of them."""

import atexit
import copy
import functools
import pathlib
import shutil
import tempfile
from typing import Any

from jaxalign import files, streams
from jaxalign.models import tokenization
from jaxalign.models.families import stable_diffusion
from jaxalign.models.weights import hub

_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_PLAIN = ("DownBlock2D", "UpBlock2D")
_CLIP_L = {
  "architectures": ["CLIPTextModel"],
  "vocab_size": 49408,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "eos_token_id": 2,
}
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
}


def unet_config(
  channels: tuple[int, ...], attention: tuple[bool, ...], **fields: Any
) -> dict[str, Any]:
  """A UNet's config.json with attention at some of its levels, highest resolution first."""
  kinds = [_CROSS if attends else _PLAIN for attends in attention]
  return {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": list(channels),
    "down_block_types": [down for down, _ in kinds],
    "up_block_types": [up for _, up in reversed(kinds)],
    "layers_per_block": 2,
    **fields,
  }


def vae_config(channels: tuple[int, ...], sample_size: int, **fields: Any) -> dict[str, Any]:
  """An autoencoder's config.json."""
  return {
    "_class_name": "AutoencoderKL",
    "block_out_channels": list(channels),
    "down_block_types": ["DownEncoderBlock2D"] * len(channels),
    "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": sample_size,
    **fields,
  }


# 18.15 M parameters, 48.07 GFLOP a forward pass of 8 latents: large enough for a CPU.
UNET_18M = unet_config(
  (64, 128, 256),
  (True, True, False),
  sample_size=32,
  cross_attention_dim=256,
  attention_head_dim=4,
)
_TEXT_256 = {
  **_CLIP_L,
  "hidden_size": 256,
  "intermediate_size": 1024,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
}
_VAE = {"scaling_factor": 0.18215}
_SD15_UNET = unet_config(
  (320, 640, 1280, 1280),
  (True, True, True, False),
  sample_size=64,
  cross_attention_dim=768,
  attention_head_dim=8,
)
_SDXL_UNET = unet_config(
  (320, 640, 1280),
  (False, True, True),
  sample_size=128,
  cross_attention_dim=2048,
  attention_head_dim=[5, 10, 20],
  transformer_layers_per_block=[1, 2, 10],
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=256,
  projection_class_embeddings_input_dim=2816,
)
_CLIP_BIG_G = {
  **_CLIP_L,
  "architectures": ["CLIPTextModelWithProjection"],
  "hidden_size": 1280,
  "intermediate_size": 5120,
  "num_hidden_layers": 32,
  "num_attention_heads": 20,
  "hidden_act": "gelu",
  "projection_dim": 1280,
}
CONFIGS: dict[str, dict[str, Any]] = {
  "18m": {
    "unet": UNET_18M,
    "vae": vae_config((32, 64), 64, **_VAE),
    "text_encoder": _TEXT_256,
  },
  "sd15": {
    "unet": _SD15_UNET,
    "vae": vae_config((128, 256, 512, 512), 512, **_VAE),
    "text_encoder": _CLIP_L,
  },
  "sdxl": {
    "unet": _SDXL_UNET,
    "vae": vae_config((128, 256, 512, 512), 1024, scaling_factor=0.13025),
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
  },
  # For counting, and for trying a case out: every kind of layer, and seconds to compile.
  "small": {
    "unet": unet_config(
      (32, 64), (True, False), sample_size=8, cross_attention_dim=32, attention_head_dim=2,
      layers_per_block=1,
    ),
    "vae": vae_config((32, 32), 16, layers_per_block=1, **_VAE),
    "text_encoder": {
      **_CLIP_L, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
      "num_attention_heads": 2, "max_position_embeddings": 12,
    },
  },
}  # fmt: skip


def build(name: str, *, random_params: bool = True) -> stable_diffusion.StableDiffusion:
  """The model of that name; its words are those of `shapes`, whatever its vocabulary has room for.

  Parameters are random numpy arrays, drawn in one thread: half a minute for XL.
  """
  configs = copy.deepcopy(CONFIGS[name])
  tokenizer = _tokenizer(configs["text_encoder"]["max_position_embeddings"])
  folders: dict[str, Any] = {"tokenizer_folder": tokenizer}
  if "text_encoder_2" in configs:
    folders["tokenizer_2_folder"] = tokenizer
  model = stable_diffusion.build(**configs, scheduler=dict(SCHEDULER), **folders)
  if not random_params:
    return model
  return model.with_params(model.init_params(streams.stream(0, "model")))


@functools.cache
def _tokenizer(length: int) -> pathlib.Path:
  """The words of `shapes` in texts of that length, in a folder that the process takes with it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxalign_tokenizer_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  tokenization.copy(hub.find_folder("shapes") / "tokenizer", folder)
  config = folder / "tokenizer_config.json"
  files.write_json(config, {**files.read_json(config), "model_max_length": length})
  return folder
