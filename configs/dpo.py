"""Preference optimisation on stored pairs: Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.recipes.shapes_preferences --output=runs/pairs --num_pairs=20480
  python -m jaxalign.main --config=configs/dpo.py --workdir=runs/dpo

On one CPU core 4 minutes, with 20480 sampled pairs of which 43 % are ties. Held-out score 0.293,
0.293 and 0.291 with seeds 0, 1 and 2 against the base model's 0.246; the 95 % intervals of the gain
are [+0.021, +0.071], [+0.021, +0.074] and [+0.020, +0.070], at less than 2 nats of KL. `:ipo`:
0.281, 0.297 and 0.282, [+0.003, +0.067], [+0.018, +0.082] and [+0.007, +0.066]. The other variants
have not been run at full length. The scores are of all held-out prompts, before validation and test
were apart, and of the noise of that version.

Variants, `--config=configs/dpo.py:NAME[,NAME]`:
  ipo        the loss of IPO (arXiv:2310.12036) on the same log-ratios
  lora       adapters of rank 16 on the attention, instead of its own weights
  full       every parameter of the UNet is trained
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 60

  # "shapes", a folder in the diffusers layout, a hub id, or a single .safetensors file.
  config.model = config_dict.ConfigDict({
    "path": "shapes",
    # Folder or hub id. A single file has neither: it needs a tokenizer, and takes the configs
    # published for its kind unless others are named.
    "tokenizer": "",
    "configs": "",
    "dtype": "float32",  # of the UNet's computation; bfloat16 is for GPUs
    "param_dtype": "float32",  # of its weights that are not trained; those that are stay float32
    "remat": "none",  # "dots" and "full" save memory: blocks are computed again for the gradient
  })
  config.lora = config_dict.ConfigDict({
    "rank": 0,  # 0 trains the layers' own weights: this network is small
    "alpha": 16.0,  # an adapter counts alpha / rank times
    # Layers to train or adapt: a regular expression over their slash-joined paths.
    "targets": r"(to_q|to_k|to_v|to_out_0)$",
    "form": "side",  # or "merged": one kernel for layer and adapter; docs/devices.md
  })

  # Devices: `data` share the batch, `fsdp` the batch and the large parameters; -1 is what is left.
  config.mesh = config_dict.ConfigDict({"data": -1, "fsdp": 1})

  config.process = config_dict.ConfigDict({
    "transition": "ddim",
    "num_steps": 8,
    "eta": 1.0,
  })
  # Of the evaluation: the loss sees the network without guidance, as published.
  config.guidance = config_dict.ConfigDict({"scale": 1.0})

  config.data = config_dict.ConfigDict({
    "source": "runs/pairs/pairs.parquet",  # or .jsonl; data/preference_files.py has the format
    "ties": "drop",  # or "half" to keep them, with p = 0.5: neither image is the winner
    "max_bad_fraction": 0.01,  # more unreadable rows than this stop the run
    "prompt_dropout": 0.0,  # share of pairs that are trained with the empty prompt
    "resize": False,  # bring images to the size of the model, whatever their aspect ratio
  })

  # Pairs of one optimizer step, and of one gradient slice.
  config.batch = config_dict.ConfigDict({"num_examples": 192, "microbatch": 32})

  config.method = config_dict.ConfigDict({
    "name": "dpo",
    # As in the published code, which takes 2000 to 5000 for Stable Diffusion at 512 pixels. The
    # error is a mean over latent dimensions, 32 times fewer here.
    "beta": 100.0,
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  })

  config.optim = config_dict.ConfigDict({
    # A gradient is mostly noise: without momentum and decay, steps of this length lead both images
    # of a pair away from where their errors are small, and hardly apart.
    "learning_rate": 5e-4,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.99,
    "epsilon": 1e-8,
    "warmup_steps": 5,  # optimizer steps
    "decay_steps": 60,  # optimizer steps until a cosine decay ends at 0; 0 is none
  })
  config.ema_decay = 0.0  # 0 keeps no average

  config.evaluation = config_dict.ConfigDict({
    "source": "shapes/test",  # of the final comparison: nothing is chosen on these prompts
    "validation": "shapes/validation",  # during the run: curves, guard, and your own tuning
    "num_images": 384,
    "rewards": ("shapes", "shapes_correct", "shapes_learned"),
    "seed": 1234,
    "every": 0,  # iterations; 0 evaluates at the end only
    "kl": False,  # the trajectory KL to the base model too; costs twice the sampling more
    "microbatch": 32,
    "features": "pixels",  # of images, that their diversity is measured by
  })
  # Over-optimisation, looked for at every evaluation during the run. 0 and "" set no bound.
  config.guard = config_dict.ConfigDict({
    "action": "off",  # "warn", or "stop", which ends the run with the best checkpoint on `gold`
    "gold": "shapes",  # a reward of the evaluation, best one that is not trained on
    "patience": 3,  # evaluations in a row without a new best
    "kl_budget": 0.0,  # nats of trajectory KL to the base model
    "diversity_floor": 0.0,  # share of the base model's diversity
  })
  config.samples = config_dict.ConfigDict({"every": 50, "num_images": 16})
  config.checkpoint = config_dict.ConfigDict({"every": 25, "keep": 2})
  config.log = config_dict.ConfigDict({"wandb_project": ""})  # "" does not log there

  for name in variant.split(",") if variant else ():
    if name not in VARIANTS:
      raise ValueError(f"configs/dpo.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    VARIANTS[name](config)
  return config


def _ipo(config):
  config.method = {"name": "ipo", "tau": 10.0, "time_weight": "half", "num_draws": 1}


def _lora(config):
  config.lora.rank = 16
  config.optim.learning_rate = 5e-3


def _full(config):
  config.lora.targets = ""
  config.optim.learning_rate = 3e-4


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_examples": 4, "microbatch": 2})
  config.evaluation.update({"num_images": 4, "microbatch": 2})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


VARIANTS = {"ipo": _ipo, "lora": _lora, "full": _full, "quicktest": _quicktest}
