"""Small versions of every published kind of Stable Diffusion, with random weights."""

import json

import jax
import numpy as np

from jaxalign.models.families import stable_diffusion

UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 8,
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": [8, 16],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "cross_attention_dim": 12,
  "attention_head_dim": 2,
}
VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [4, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
  "norm_num_groups": 2,
  "scaling_factor": 0.18215,
  "sample_size": 16,
}
TEXT = {
  "architectures": ["CLIPTextModel"],
  "model_type": "clip_text_model",
  "vocab_size": 60,
  "hidden_size": 12,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 8,
  "hidden_act": "quick_gelu",
  "bos_token_id": 0,
  "eos_token_id": 2,  # as the published configs have it, whatever the vocabulary says
  "pad_token_id": 1,
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
# Stable Diffusion 2.x: linear projections, heads by level, another activation, velocities.
SD2 = {
  "unet": {
    **UNET,
    "attention_head_dim": [1, 2],
    "use_linear_projection": True,
    "upcast_attention": True,
  },
  "vae": VAE,
  "text_encoder": {**TEXT, "hidden_act": "gelu", "num_hidden_layers": 3},
  "scheduler": {**SCHEDULER, "prediction_type": "v_prediction"},
}
XL = {
  "unet": {
    **UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 28,
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
  },
  "vae": {**VAE, "scaling_factor": 0.13025, "force_upcast": True},
  "text_encoder": TEXT,
  "text_encoder_2": {
    **TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "projection_dim": 10,
  },
  "scheduler": SCHEDULER,
}
KINDS = {
  "sd1": {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": SCHEDULER},
  "sd2": SD2,
  "xl": XL,
  "pix2pix": {
    "unet": {**UNET, "in_channels": 8},
    "vae": VAE,
    "text_encoder": TEXT,
    "scheduler": SCHEDULER,
    "pipeline": {
      "_class_name": "StableDiffusionInstructPix2PixPipeline",
      "requires_safety_checker": False,
    },
  },
}


def write_tokenizer(folder, pad="<|endoftext|>"):
  """A CLIP tokenizer over ! and a-z with four merges; "cat" and "a" are one token each."""
  letters = "!abcdefghijklmnopqrstuvwxyz"
  merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
  vocab = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
  vocab += ["<|startoftext|>", "<|endoftext|>"]
  special = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": pad,
  }
  folder.mkdir(parents=True)
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
  (folder / "special_tokens_map.json").write_text(json.dumps(special))
  config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, **special}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def randomized(model, seed=0):
  """The model with random parameters that leave no activation trivially small or constant.

  Biases, norms and embeddings are away from the zeros, ones and hundredths they start with, so that
  no swap of two parameters goes unseen.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ("scale", "bias"):
      offset = 1.0 if name == "scale" else 0.0
      return np.float32(offset) + 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return leaf * np.float32(20.0) if name == "embedding" else leaf

  params = model.init_params(jax.random.key(seed))
  return model.with_params(jax.tree_util.tree_map_with_path(draw, params))


def make(kind, folder):
  """A random model of the kind; its tokenizers are written to the empty `folder`.

  The second tokenizer of an XL pads with "!", the first entry of its vocabulary, as the published
  one does.
  """
  tokenizers = {"tokenizer_folder": write_tokenizer(folder / "tokenizer")}
  if "text_encoder_2" in KINDS[kind]:
    tokenizers["tokenizer_2_folder"] = write_tokenizer(folder / "tokenizer_2", pad="!")
  return randomized(stable_diffusion.build(**KINDS[kind], **tokenizers))
