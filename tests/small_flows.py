"""Small versions of every family of flow transformers, as folders with random weights."""

import importlib
import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
import small_models
import tokenizers

from jaxalign import files
from jaxalign.models.families import flow, initialization
from jaxalign.models.identity import classes, parts
from jaxalign.models.identity.identity import Identity
from jaxalign.models.networks import decoder, packing
from jaxalign.models.weights import safetensors_io

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
DYNAMIC = {
  **FLOW,
  "use_dynamic_shifting": True,
  "base_shift": 0.5,
  "max_shift": 1.15,
  "base_image_seq_len": 16,
  "max_image_seq_len": 64,
}
FLUX1 = {
  "transformer": {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 2, 2],
  },
  "vae": SD3["vae"],
  "text_encoder": small_models.TEXT,
  "text_encoder_2": T5,
  "scheduler": DYNAMIC,
  "pipeline": {"_class_name": "FluxPipeline"},
}
WORDS = (
  *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
  *("system", "user", "assistant", "\n", ",", ":", "Describe", "the", "image", "by", "detailing"),
  *("color", "shape", "size", "texture", "quantity", "text", "spatial", "relationships", "of"),
  *("objects", "and", "background", "a", "cat", "dog", "red"),
)
QWEN3 = {
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "vocab_size": len(WORDS),
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 4,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
}
CHAT = {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
FLUX2 = {
  "transformer": {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": [2, 2, 2, 2],
    "guidance_embeds": False,
  },
  "vae": {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "latent_channels": 3,
    "sample_size": 16,
  },
  "text_encoder": {**QWEN3, "num_hidden_layers": 28},
  "scheduler": DYNAMIC,
  "pipeline": {**CHAT, "_class_name": "Flux2KleinPipeline", "is_distilled": False},
}
Z_IMAGE = {
  "transformer": {
    "_class_name": "ZImageTransformer2DModel",
    "in_channels": 3,
    "dim": 16,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [4, 2, 2],
    "axes_lens": [1024, 256, 256],
  },
  "vae": SD3["vae"],
  "text_encoder": QWEN3,
  "scheduler": {**FLOW, "shift": 6.0},
  "pipeline": {**CHAT, "_class_name": "ZImagePipeline"},
}
QWEN_IMAGE = {
  "transformer": {
    "_class_name": "QwenImageTransformer2DModel",
    "in_channels": 12,
    "out_channels": 3,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": [4, 2, 2],
  },
  "vae": {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.3, -0.2, 0.1],
    "latents_std": [1.5, 0.7, 1.1],
  },
  "text_encoder": {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
      **{name: value for name, value in QWEN3.items() if name not in ("architectures", "head_dim")},
      "model_type": "qwen2_5_vl_text",
      "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    },
    "vision_config": {
      **{"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8},
      **{"out_hidden_size": 8, "fullatt_block_indexes": [0]},
    },
  },
  "scheduler": {**DYNAMIC, "max_shift": 0.9, "shift_terminal": 0.02},
  "pipeline": {**CHAT, "_class_name": "QwenImagePipeline"},
}
KINDS = {
  "sd3": SD3,
  "sd3_without_t5": WITHOUT_T5,
  "flux1": FLUX1,
  "flux2": FLUX2,
  "z_image": Z_IMAGE,
  "qwen_image": QWEN_IMAGE,
}
# What the language model of a file is called in it.
PREFIXES = {"qwen3": "model.", "qwen2_5_vl": "model.language_model."}
TEMPLATE = (
  "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
  "'<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
  "{%- if enable_thinking is defined and enable_thinking is false %}"
  "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def family(kind):
  """The `flow.Family` of a kind."""
  name = kind.partition("_without")[0]
  return importlib.import_module(f"jaxalign.models.families.{name}").FAMILY


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


def write_chat_tokenizer(folder):
  """A Qwen's tokenizer, of words, whose chat template knows of thoughts."""
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
  )
  special = [tokenizers.AddedToken(word, special=True) for word in WORDS[1:6]]
  made.add_special_tokens(special)
  words = tokenizers.Regex(r"\n|\w+|[^\w\s]")
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split(words, "removed", invert=True)
  folder.mkdir(parents=True)
  made.save(str(folder / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 64,
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  return folder


def random_params(shapes, seed=0):
  """Random parameters of every component, none trivially small; tables of positions as they are."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ("scale", "bias", "gamma", "running_mean"):
      one = np.float32(name in ("scale", "gamma"))
      return one + 0.3 * rng.standard_normal(leaf.shape, np.float32)
    if name == "running_var":
      return rng.uniform(0.2, 3.0, leaf.shape).astype(np.float32)
    return leaf * np.float32(20.0) if name == "embedding" else leaf

  params = initialization.random_params(jax.random.key(seed), shapes)
  return jax.tree_util.tree_map_with_path(draw, params)


def write_language_model(folder, config):
  """Every layer of it, random, in the layout of transformers."""
  shape = decoder.DecoderConfig.from_dict(config)
  network = decoder.DecoderModel(shape, (shape.num_hidden_layers,))
  ids = jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), ids)["params"]
  tensors = safetensors_io.to_tensors(random_params({"": shapes})[""])
  prefix = PREFIXES[config["model_type"]]
  folder.mkdir(parents=True)
  named = {prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  safetensors.numpy.save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
  files.write_json(folder / "config.json", config)


def write_vae(folder, config, params):
  """FLUX.2's or Qwen-Image's autoencoder in diffusers' layout, of what one frame sees."""
  tensors = safetensors_io.to_tensors(params)
  if "running_mean" in params.get("bn", {}):
    tensors["bn.num_batches_tracked"] = np.array(7)
  else:
    tensors = {name: _in_three_dimensions(name, tensor) for name, tensor in tensors.items()}
  folder.mkdir(parents=True)
  named = {name: tensor.copy(order="C") for name, tensor in tensors.items()}
  file = folder / "diffusion_pytorch_model.safetensors"
  safetensors.numpy.save_file(named, file, metadata={"format": "pt"})
  files.write_json(folder / "config.json", config)


def _in_three_dimensions(name, tensor):
  """Kernels of three frames, the first two of which one frame does not see."""
  if name.endswith("gamma"):
    return tensor.reshape(-1, *((1,) * (2 if "attentions" in name else 3)))
  in_space = "resample" in name or "attentions" in name
  if tensor.ndim != 4 or in_space:
    return tensor
  count = 1 if tensor.shape[-1] == 1 else 3
  kernel = np.random.default_rng(0).standard_normal((*tensor.shape[:2], count, *tensor.shape[2:]))
  kernel = kernel.astype(np.float32)
  kernel[:, :, -1] = tensor
  return kernel


def write(kind, folder, length=8, **changes):
  """Writes a random model of the kind to `folder`, its tokenizers included.

  `changes` are configs of components, whose fields replace those of the kind.
  """
  folder = pathlib.Path(folder)
  configs = {name: {**config, **changes.get(name, {})} for name, config in KINDS[kind].items()}
  of = family(kind)
  as_read = {name: classes.text_half(config) for name, config in configs.items()}
  networks = of.make(as_read, length)
  params = random_params(networks.param_shapes())
  for name, part in of.kind.parts.items():
    if name == "text_encoder" and part.copied:
      write_language_model(folder / name, configs[name])
    elif part.copied:
      write_vae(folder / name, configs[name], params[name])
    elif part.fields is parts.TOKENIZER and name.replace("tokenizer", "text_encoder") in configs:
      write_tokenizer(folder / name, part)
  if of.kind.parts["text_encoder"].copied:
    write_chat_tokenizer(folder / "tokenizer")
  model = flow.as_model(of, networks, params, Identity(as_read, ()), folder)
  model.files.save(model.params, folder)
  return folder


def write_tokenizer(folder, part):
  """Of a CLIP or a T5; the second CLIP's pads otherwise."""
  if part.classes[0].startswith("T5"):
    write_t5_tokenizer(folder)
  elif part.classes[0].startswith("CLIP"):
    small_models.write_tokenizer(folder, **({"pad": "!"} if folder.name == "tokenizer_2" else {}))


def latents_for_diffusers(kind, noise):
  """Latents `[B, H, W, C]` as diffusers' pipeline of the kind takes them."""
  import torch

  if kind in ("flux1", "qwen_image"):
    return torch.from_numpy(packing.pack(noise, "c_dy_dx")).flatten(1, 2)
  if kind == "flux2":
    noise = packing.pack(noise, "c_dy_dx")
  return torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
