"""The configurations of published models, for files that come without any.

As in the repositories of Stable Diffusion 1.5, 2.1 and XL base 1.0.
"""

from typing import Any

_UNET: dict[str, Any] = {
  "_class_name": "UNet2DConditionModel",
  "act_fn": "silu",
  "center_input_sample": False,
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
}
_FOUR_LEVELS = {
  "block_out_channels": [320, 640, 1280, 1280],
  "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
  "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_VAE: dict[str, Any] = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT: dict[str, Any] = {
  "architectures": ["CLIPTextModel"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "pad_token_id": 1,
  "vocab_size": 49408,
}
_CLIP_L = {
  **_TEXT,
  "hidden_act": "quick_gelu",
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "projection_dim": 768,
}
_SCHEDULER: dict[str, Any] = {
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}

# By kind and component. Text encoders of 2.x end before their original's last layer, whose output
# the UNet was not trained on.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
  "1.x": {
    "unet": {
      **_UNET,
      **_FOUR_LEVELS,
      "attention_head_dim": 8,
      "cross_attention_dim": 768,
      "sample_size": 64,
    },
    "vae": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    "text_encoder": _CLIP_L,
    "scheduler": {"_class_name": "PNDMScheduler", **_SCHEDULER},
  },
  "2.x": {
    "unet": {
      **_UNET,
      **_FOUR_LEVELS,
      "attention_head_dim": [5, 10, 20, 20],
      "cross_attention_dim": 1024,
      "sample_size": 96,
      "upcast_attention": True,
      "use_linear_projection": True,
    },
    "vae": {**_VAE, "sample_size": 768, "scaling_factor": 0.18215},
    "text_encoder": {
      **_TEXT,
      "hidden_act": "gelu",
      "hidden_size": 1024,
      "intermediate_size": 4096,
      "num_attention_heads": 16,
      "num_hidden_layers": 23,
      "projection_dim": 512,
    },
    "scheduler": {
      "_class_name": "DDIMScheduler", **_SCHEDULER, "prediction_type": "v_prediction"
    },
  },
  "xl": {
    "unet": {
      **_UNET,
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": 256,
      "attention_head_dim": [5, 10, 20],
      "block_out_channels": [320, 640, 1280],
      "cross_attention_dim": 2048,
      "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
      "projection_class_embeddings_input_dim": 2816,
      "sample_size": 128,
      "transformer_layers_per_block": [1, 2, 10],
      "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
      "use_linear_projection": True,
    },
    "vae": {**_VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _CLIP_L,
    "text_encoder_2": {
      **_TEXT,
      "architectures": ["CLIPTextModelWithProjection"],
      "hidden_act": "gelu",
      "hidden_size": 1280,
      "intermediate_size": 5120,
      "num_attention_heads": 20,
      "num_hidden_layers": 32,
      "projection_dim": 1280,
    },
    "scheduler": {
      "_class_name": "EulerDiscreteScheduler",
      **_SCHEDULER,
      "interpolation_type": "linear",
      "prediction_type": "epsilon",
      "sample_max_value": 1.0,
      "timestep_spacing": "leading",
      "use_karras_sigmas": False,
    },
  },
}
