"""Small versions of every family of flow transformers, as folders with random weights."""

import json
import pathlib

import jax
import numpy as np
import small_models
import tokenizers

from jaxalign.models.families import initialization, sd3
from jaxalign.models.identity.identity import Identity

CLIP = {
  **small_models.TEXT,
  "architectures": ["CLIPTextModelWithProjection"],
  "eos_token_id": 59,
  "projection_dim": 6,
}
T5 = {
  "architectures": ["T5EncoderModel"],
  "model_type": "t5",
  "vocab_size": 40,
  "d_model": 32,
  "d_kv": 6,
  "d_ff": 20,
  "num_layers": 2,
  "num_heads": 3,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 12,
  "feed_forward_proj": "gated-gelu",
  "is_gated_act": True,
  "dense_act_fn": "gelu_new",
}
FLOW = {
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "num_train_timesteps": 1000,
  "shift": 3.0,
}
SD3 = {
  "transformer": {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 6,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
  },
  "vae": {
    **small_models.VAE,
    "latent_channels": 3,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
  },
  "text_encoder": CLIP,
  "text_encoder_2": {**CLIP, "hidden_size": 16, "hidden_act": "gelu", "projection_dim": 10},
  "text_encoder_3": T5,
  "scheduler": FLOW,
  "pipeline": {"_class_name": "StableDiffusion3Pipeline"},
}
WITHOUT_T5 = {name: config for name, config in SD3.items() if name != "text_encoder_3"}
KINDS = {"sd3": SD3, "sd3_without_t5": WITHOUT_T5}


def write_t5_tokenizer(folder, length=16):
  """A T5 tokenizer: pieces of letters, with </s> at the end and <pad> behind it."""
  special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
  pieces = [(token, 0.0) for token in special.values()]
  pieces += [(piece, -2.0) for piece in ("▁", "▁cat", "▁dog", "at", *"abcdefghijklmnopqrstuvwxyz")]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
  made.normalizer = tokenizers.normalizers.Lowercase()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  folder.mkdir(parents=True)
  made.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": length, "extra_ids": 0}
  (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
  return folder


def random_params(networks, seed=0):
  """Random parameters of every component, none trivially small; tables of positions as they are."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ("scale", "bias"):
      return np.float32(name == "scale") + 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return leaf * np.float32(20.0) if name == "embedding" else leaf

  params = initialization.random_params(jax.random.key(seed), networks.param_shapes())
  return jax.tree_util.tree_map_with_path(draw, params)


def write(kind, folder, **changes):
  """Writes a random model of the kind to `folder`, its tokenizers included, and returns it.

  `changes` are configs of components, whose fields replace those of the kind.
  """
  folder = pathlib.Path(folder)
  configs = {name: {**config, **changes.get(name, {})} for name, config in KINDS[kind].items()}
  small_models.write_tokenizer(folder / "tokenizer")
  small_models.write_tokenizer(folder / "tokenizer_2", pad="!")
  if "text_encoder_3" in configs:
    write_t5_tokenizer(folder / "tokenizer_3")
  networks = sd3.make(configs, text_length=8)
  model = sd3.as_model(networks, random_params(networks), Identity(configs, ()), folder)
  model.files.save(model.params, folder)
  return folder
