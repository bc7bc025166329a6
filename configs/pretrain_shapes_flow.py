"""Pretrains a rectified flow by an MMDiT on the `shapes` world, in the layout of SD3.

  python -m jaxalign.main --config=pretrain_shapes_flow --workdir=runs/pretrain_shapes_flow

Stable Diffusion 3 in miniature (Esser et al. 2024, arXiv:2403.03206): two text encoders, queries
and keys normalised, logit-normal times. The autoencoder is that of `shapes`.

Not yet run to its end.
"""

from ml_collections import config_dict

from configs import common, pretrain_shapes


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict({"flow": "pretrain", "seed": 0})
  config.data = {"num_images": 120_000, "caption_error": 0.0}
  text = {
    "architectures": ["CLIPTextModelWithProjection"],
    **common.text_encoder(),
    "projection_dim": 32,
  }
  config.model = {
    "transformer": TRANSFORMER,
    "vae": pretrain_shapes.VAE,
    "text_encoder": text,
    "text_encoder_2": {**text, "hidden_act": "gelu"},
    "scheduler": SCHEDULER,
    "pipeline": {"_class_name": "StableDiffusion3Pipeline", "_max_sequence_length": 1},
  }
  config.autoencoder = {"path": "shapes"}
  config.denoiser = {
    "batches": {"batch_size": 64, "caption_dropout": 0.1},
    "timesteps": {"logit_mean": 0.0, "logit_std": 1.0},
    "fit": common.fit(num_steps=40_000, learning_rate=1e-3),
  }
  return config


TRANSFORMER = {
  "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 1,
  "in_channels": 8, "out_channels": 8, "num_layers": 5, "attention_head_dim": 32,
  "num_attention_heads": 4, "joint_attention_dim": 128, "caption_projection_dim": 128,
  "pooled_projection_dim": 64, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
  "dual_attention_layers": [],
}
SCHEDULER = {
  "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
}
