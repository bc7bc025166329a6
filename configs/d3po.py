"""D3PO on the embedded `shapes` model (Yang et al. 2023, arXiv:2311.13231).

  python -m jaxalign.main --config=configs/d3po.py --workdir=runs/d3po

Direct preference optimisation of sampled trajectories: of each prompt the best and the worst of a
few images that started from the same noise.

On one CPU core 3 minutes. Held-out score 0.306, 0.322 and 0.285 with seeds 0, 1 and 2 against the
base model's 0.246; the 95 % intervals of the gain are [+0.024, +0.094], [+0.028, +0.127] and
[+0.000, +0.076]. The variants have not been run at full length. The scores are of all held-out
prompts, before validation and test were apart, and of the noise of that version.

Variants, `--config=configs/d3po.py:NAME[,NAME]`:
  lora       adapters of rank 16 on the attention, instead of its own weights
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 18

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
    "eta": 1.0,  # 1 is the ancestral sampler; 0 has no density and cannot be trained
  })
  # Classifier-free guidance, in rollout and update alike. It doubles the cost; 1 is none.
  config.guidance = config_dict.ConfigDict({"scale": 1.0})

  config.data = config_dict.ConfigDict({"source": "shapes/train"})

  # All sizes are global and per iteration.
  config.batch = config_dict.ConfigDict({
    "num_prompts": 64,
    "images_per_prompt": 4,  # of which the best and the worst become a pair
    "microbatch": 32,  # images per rollout program, and in the pairs of a gradient slice
    "updates_per_epoch": 1,  # optimizer steps per pass over the images
    "num_epochs": 1,  # passes over the images
    # Images are shuffled within this many parts of a microbatch; 0 is one for each device, so that
    # none leaves its device. A number that all your machines divide gives the same run on each.
    "shards": 0,
    # Trained are, of the steps with noise, those in this range (0 the first, at the highest noise
    # level, to 1), and of these a random fraction for each image. The last ones decide little
    # here, and their gradients, inversely proportional to the noise, would drown the others'.
    "timestep_range": (0.0, 0.7),
    "timestep_fraction": 1.0,
  })

  # Built-in names, or your own function as "package.module:function".
  config.reward = config_dict.ConfigDict({
    "names": ("shapes",),
    "weights": (1.0,),
    "kwargs": ({},),  # of each reward
    "normalize": "none",  # or "batch": each to mean 0 and std 1 before it is weighted
  })
  config.reward_pool = config_dict.ConfigDict({"num_threads": 1})

  # per_prompt, group, group_global_std, batch or leave_one_out, each with its own fields.
  config.method = config_dict.ConfigDict({
    "name": "d3po",
    # Of log-probabilities averaged over latent dimensions, 512 here: it is 1/512 of a nat's beta.
    "beta": 50.0,
    "clip_range": 0.1,  # of each step's probability ratio to the base model
  })

  config.optim = config_dict.ConfigDict({
    "learning_rate": 1.5e-3,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    # Bias correction lets the first gradients of a momentum of 0.9 count several times, and a run
    # of a few steps is made of those.
    "b1": 0.0,
    "b2": 0.99,
    "epsilon": 1e-8,
    "warmup_steps": 0,  # optimizer steps
    "decay_steps": 0,  # optimizer steps until a cosine decay ends at 0; 0 is none
  })
  config.ema_decay = 0.0  # 0 keeps no average

  # How far rollout and update may differ about a log-probability, before the run is ended. It is
  # nothing to the first update after a rollout; docs/exactness.md has what was measured.
  config.exactness = config_dict.ConfigDict({
    "max_log_prob_gap": 1e-5,  # of any transition
    "tolerance": 1e-5,  # a gap that counts as none
    "max_share": 0.0,  # of the transitions may have a larger one
  })

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
  config.samples = config_dict.ConfigDict({"every": 8, "num_images": 16})
  config.checkpoint = config_dict.ConfigDict({"every": 5, "keep": 2})
  config.log = config_dict.ConfigDict({"wandb_project": ""})  # "" does not log there

  for name in variant.split(",") if variant else ():
    if name not in VARIANTS:
      raise ValueError(f"configs/d3po.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    VARIANTS[name](config)
  return config


def _lora(config):
  config.lora.rank = 16
  config.optim.learning_rate = 5e-3


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_prompts": 4, "images_per_prompt": 2, "microbatch": 4})
  config.evaluation.update({"num_images": 4, "microbatch": 2})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


VARIANTS = {"lora": _lora, "quicktest": _quicktest}
