"""Pretrains the embedded `shapes` model: autoencoder, then text encoder and UNet together.

  python -m jaxalign.main --config=configs/pretrain_shapes.py --workdir=runs/pretrain_shapes

Run on 2 CPU cores, which were shared with other work: about 16 minutes for the autoencoder and 48
for the text encoder and UNet. The autoencoder's reconstructions are judged right for 98 % of 192
held-out scenes (peak signal-to-noise ratio 29.4 dB). With 10 steps at eta 1, of 192 images of
held-out prompts 12 % are right in every fact without guidance (mean score 0.26), and 24 % at
guidance 2 (0.44). Of the captions of that run 849 were held-out prompts under wrong pictures; today
none is, and it has not been run again.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "pretrain"
  config.seed = 0

  config.data = config_dict.ConfigDict({
    "num_images": 24_000,
    # Fraction of captions with one wrong fact. It leaves the headroom that alignment closes.
    "caption_error": 0.15,
  })

  # The config.json files of the four components, as diffusers and transformers write them.
  config.model = config_dict.ConfigDict({
    "vae": {
      "_class_name": "AutoencoderKL",
      "in_channels": 3,
      "out_channels": 3,
      "down_block_types": ["DownEncoderBlock2D"] * 4,
      "up_block_types": ["UpDecoderBlock2D"] * 4,
      "block_out_channels": [8, 24, 48, 96],
      "layers_per_block": 1,
      "act_fn": "silu",
      "latent_channels": 8,
      "norm_num_groups": 1,  # narrow groups of a narrow network would lose absolute colours
      "sample_size": 64,
      "mid_block_add_attention": False,
      "force_upcast": False,
      "scaling_factor": 1.0,  # replaced by 1 / std of the latents once the autoencoder is fitted
    },
    "unet": {
      "_class_name": "UNet2DConditionModel",
      "sample_size": 8,
      "in_channels": 8,
      "out_channels": 8,
      "down_block_types": ["CrossAttnDownBlock2D"] * 2,
      "mid_block_type": "UNetMidBlock2DCrossAttn",
      "up_block_types": ["CrossAttnUpBlock2D"] * 2,
      "block_out_channels": [64, 64],
      "layers_per_block": 1,
      "act_fn": "silu",
      "norm_num_groups": 8,
      "norm_eps": 1e-5,
      "cross_attention_dim": 64,
      "attention_head_dim": 4,  # diffusers' name for the number of heads
      "use_linear_projection": True,
    },
    "text_encoder": {
      "architectures": ["CLIPTextModel"],
      "model_type": "clip_text_model",
      "vocab_size": 0,  # replaced by the size of the tokenizer's vocabulary
      "hidden_size": 64,
      "intermediate_size": 128,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 12,
      "hidden_act": "quick_gelu",
      "layer_norm_eps": 1e-5,
      "bos_token_id": 0,
      "eos_token_id": 2,
      "pad_token_id": 1,
    },
    "scheduler": {
      "_class_name": "DDIMScheduler",
      "num_train_timesteps": 1000,
      "beta_start": 0.00085,
      "beta_end": 0.012,
      "beta_schedule": "scaled_linear",
      "prediction_type": "v_prediction",
      "timestep_spacing": "trailing",
      "steps_offset": 1,
      # The last step is then deterministic and drops out of policy gradients. With False it keeps a
      # small variance: at 10 steps its mean moves 11 standard deviations for a unit change of the
      # prediction, where no other step's moves more than 1.2, and its noise drowns theirs.
      "set_alpha_to_one": True,
      "clip_sample": False,
    },
  })

  optimizer = {
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.99,
    "epsilon": 1e-8,
    "warmup_steps": 100,
  }
  config.autoencoder = config_dict.ConfigDict({
    "num_images": 4_000,
    "batches": {"batch_size": 16, "crop_size": 32, "full_from": 5000},
    "kl_weight": 1e-5,
    "fit": {
      "num_steps": 6000,
      "learning_rate": 3e-3,
      "log_every": 50,
      "checkpoint_every": 500,
      **optimizer,
    },
  })
  config.denoiser = config_dict.ConfigDict({
    "batches": {"batch_size": 32, "caption_dropout": 0.1},
    "timesteps": {"logit_mean": 0.0, "logit_std": 1.0},
    "fit": {
      "num_steps": 12_000,
      "learning_rate": 1.5e-3,
      "log_every": 50,
      "checkpoint_every": 500,
      **optimizer,
    },
  })
  return config
