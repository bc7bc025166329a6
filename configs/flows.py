"""What configs of flow transformers share: the models, and the methods that several have."""

from typing import NamedTuple

from ml_collections import config_dict

from configs import common


class Model(NamedTuple):
  """A flow transformer that runs start from: where it is, and what its makers and peers take.

  text_length: tokens that are read of a prompt.
  guidance: the scale, as the model's own pipeline means it.
  targets: of adapters.
  """

  path: str
  text_length: int
  guidance: float
  targets: str


_ATTENTION = r"attn/(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)$"  # of both streams
SD35 = Model("stabilityai/stable-diffusion-3.5-medium", 256, 4.5, _ATTENTION)
KLEIN = Model(
  "black-forest-labs/FLUX.2-klein-base-4B",
  512,
  4.0,
  rf"{_ATTENTION}|ff(_context)?/linear_(in|out)$|attn/(to_qkv_mlp_proj|to_out)$",
)
Z_IMAGE = Model("Tongyi-MAI/Z-Image", 512, 5.0, r"/(to_[qkv]|to_out_0)$")
QWEN_IMAGE = Model("Qwen/Qwen-Image", 512, 4.0, rf"{_ATTENTION}|(img|txt)_mlp/net_[02]")


def adapters(model: Model, *, num_iterations: int, learning_rate: float) -> config_dict.ConfigDict:
  """A run that aligns adapters of a flow transformer on GPUs, without its process."""
  config = common.sd15(num_iterations=num_iterations, learning_rate=learning_rate)
  config.model.update({
    "path": model.path,
    "image_size": (512, 512),  # pixels
    "text_length": model.text_length,
    # Prompts are encoded before anything else, and the text encoders freed; False keeps them in
    # the programs, in float32.
    "encode_once": True,
  })
  config.lora.update({"rank": 32, "alpha": 64.0, "targets": model.targets})
  config.optim.weight_decay = 1e-4
  config.guidance.scale = model.guidance
  return config


def flow_grpo(model: Model) -> config_dict.ConfigDict:
  """Flow-GRPO of any flow transformer, without variants."""
  config = adapters(model, num_iterations=1000, learning_rate=3e-4)
  config.lora.form = "merged"
  config.process = {"transition": "flow_sde", "num_steps": 10, "noise_level": 0.7}
  sizes = {"num_records": 48, "group_size": 24, "microbatch": 24}
  common.online(config, "prompts.txt", **sizes, reward="clip")
  config.reward.kwargs = common.PICKSCORE
  config.batch.updates_per_epoch = 2
  config.batch.timestep_range = (0.0, 0.99)
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {
    "name": "ddpo",
    "clip_range": 1e-4,  # of the ratio of log-probabilities averaged over D = 65536 latents
    "kl_weight": 0.0,
  }
  # The bounds of bfloat16: the first is the clip range, as no gap may decide what is clipped.
  config.exactness.update({"max_log_prob_gap": 1e-4, "max_share": 0.05})
  config.ema_decay = 0.9
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 30})
  config.samples.every = 30
  return config


def dpo(model: Model) -> config_dict.ConfigDict:
  """Diffusion-DPO of any flow transformer, without variants."""
  config = adapters(model, num_iterations=2000, learning_rate=1e-4)
  config.process = {"transition": "euler", "num_steps": 28}
  common.stored_pairs(config, "pairs.parquet", num_examples=128, microbatch=8)
  config.data.resize = "crop"
  config.method = {
    "name": "dpo",
    "beta": 2000.0,
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  }
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 250})
  config.samples.every = 250
  config.checkpoint.every = 50
  return config


QUICKTEST_GRPO = common.quicktest_sd15(
  num_records=2, group_size=2, microbatch=2, updates_per_epoch=2
)
QUICKTEST_DPO = common.quicktest_sd15(num_examples=4, microbatch=2)
