"""DDPO on Stable Diffusion XL (Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=configs/ddpo_sdxl.py --workdir=runs/ddpo_sdxl \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt

Images that compress well as JPEG. No hyper-parameters are published for XL: these are those of
configs/ddpo_sd15.py.

Not yet run on the real weights. Expected to fit one GPU of 80 GB at this microbatch, which must be
a multiple of the number of devices; `--dry_run` says what it takes on yours.

Variants, `--config=configs/ddpo_sdxl.py:NAME[,NAME]`:
  full       every parameter of the UNet is trained; it takes several GPUs, with mesh.fsdp above 1
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 100

  # A folder in the diffusers layout, a hub id, or a single .safetensors file.
  config.model = config_dict.ConfigDict({
    "path": "stabilityai/stable-diffusion-xl-base-1.0",
    "tokenizer": "",  # folder or hub id; a single .safetensors file needs one
    "configs": "",  # those of a single file, if not the published ones
    "dtype": "bfloat16",  # of the UNet's computation
    "param_dtype": "bfloat16",  # of its weights that are not trained
    "vae_dtype": "float32",  # that images are decoded in
    "remat": "none",  # "none", "dots" or "full": compute blocks again, to save memory
  })
  config.lora = config_dict.ConfigDict({
    "rank": 4,
    "alpha": 4.0,  # an adapter counts alpha / rank times
    # Layers to adapt: a regular expression over their slash-joined paths.
    "targets": r"(to_q|to_k|to_v|to_out_0)$",
    "form": "merged",  # one kernel for layer and adapter; "side" is exact. docs/devices.md
  })

  # Devices: `data` share the batch, `fsdp` the batch and the large parameters; -1 is what is left.
  config.mesh = config_dict.ConfigDict({"data": -1, "fsdp": 1})

  config.process = config_dict.ConfigDict({
    "transition": "ddim",
    "num_steps": 50,
    "eta": 1.0,  # the ancestral sampler
  })
  # Classifier-free guidance, in rollout and update alike.
  config.guidance = config_dict.ConfigDict({"scale": 5.0})

  # One prompt a line, or .jsonl objects with a "prompt".
  config.data = config_dict.ConfigDict({"source": "prompts.txt"})

  # All sizes are global and per iteration.
  config.batch = config_dict.ConfigDict({
    "num_prompts": 256,  # drawn in turn, so several times from a shorter file
    "images_per_prompt": 1,
    "microbatch": 2,  # images per rollout program, transitions per gradient slice, of all devices
    "updates_per_epoch": 4,  # optimizer steps per pass over the images
    "num_epochs": 1,  # passes over the images
    # Images are shuffled within this many parts of a microbatch; 0 is one for each device, so that
    # none leaves its device. A number that all your machines divide gives the same run on each.
    "shards": 0,
    "timestep_range": (0.0, 1.0),
    "timestep_fraction": 1.0,
  })

  # Built-in names, or your own function as "package.module:function".
  config.reward = config_dict.ConfigDict({
    "names": ("jpeg_compressibility",),
    "weights": (1.0,),
    "kwargs": ({},),  # of each reward
    "normalize": "none",  # or "batch": each to mean 0 and std 1 before it is weighted
  })
  config.reward_pool = config_dict.ConfigDict({"num_threads": 1})

  config.advantage = config_dict.ConfigDict({
    "name": "per_prompt",
    "buffer_size": 16,  # rewards remembered of each prompt
    "min_count": 16,  # with fewer of them, statistics of the batch are used
    "epsilon": 1e-6,
    "limit": 5.0,  # advantages are clipped to this
  })

  config.method = config_dict.ConfigDict({
    "name": "ddpo",
    # Of the ratio of log-probabilities averaged over latent dimensions, D = 65536 at 1024 pixels:
    # it allows four times the log-ratio that it does in Stable Diffusion 1.5.
    "clip_range": 1e-4,
    "kl_weight": 0.0,  # what a nat of KL to the base model costs; 0 does not compute it
  })

  config.optim = config_dict.ConfigDict({
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "weight_decay": 1e-4,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
  })
  config.ema_decay = 0.0  # 0 keeps no average

  # How far rollout and update may differ about a log-probability, before the run is ended. It is
  # nothing to the first update after a rollout; a gap as large as the clip range would decide what
  # is clipped in later ones. docs/exactness.md has what was measured, on CPUs.
  config.exactness = config_dict.ConfigDict({
    "max_log_prob_gap": 1e-4,  # of any transition
    "tolerance": 1e-5,  # a gap that counts as none
    "max_share": 0.05,  # of the transitions may have a larger one
  })

  config.evaluation = config_dict.ConfigDict({
    "source": "held_out.txt",
    # Prompts for curves and guard during the run, apart from those of the final comparison: a file,
    # or "" for a third of source, chosen by its text, where `every` is above 0.
    "validation": "",
    "num_images": 64,
    "rewards": ("jpeg_compressibility",),
    "seed": 1234,
    "every": 10,  # iterations; 0 evaluates at the end only
    "kl": False,  # the trajectory KL to the base model too; costs twice the sampling more
    "microbatch": 2,
    "features": "pixels",  # of images, that their diversity is measured by
  })
  # Over-optimisation, looked for at every evaluation during the run. 0 and "" set no bound.
  config.guard = config_dict.ConfigDict({
    "action": "off",  # "warn", or "stop", which ends the run with the best checkpoint on `gold`
    "gold": "",  # a reward of the evaluation, best one that is not trained on
    "patience": 3,  # evaluations in a row without a new best
    "kl_budget": 0.0,  # nats of trajectory KL to the base model
    "diversity_floor": 0.0,  # share of the base model's diversity
  })
  config.samples = config_dict.ConfigDict({"every": 10, "num_images": 8})
  config.checkpoint = config_dict.ConfigDict({"every": 5, "keep": 2})
  config.log = config_dict.ConfigDict({"wandb_project": ""})  # "" does not log there

  for name in variant.split(",") if variant else ():
    if name not in VARIANTS:
      raise ValueError(
        f"configs/ddpo_sdxl.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}"
      )
    VARIANTS[name](config)
  return config


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_prompts": 4, "microbatch": 2, "updates_per_epoch": 2})
  config.evaluation.update({"num_images": 2, "microbatch": 2, "every": 0})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


def _full(config):
  config.lora.update({"rank": 0, "targets": ""})
  config.optim.learning_rate = 1e-5


VARIANTS = {"quicktest": _quicktest, "full": _full}
