"""Diffusion-DPO on Stable Diffusion XL (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=configs/dpo_sdxl.py --workdir=runs/dpo_sdxl \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

All weights on stored pairs, such as Pick-a-Pic's, with the published hyper-parameters: 2048 pairs
an update, learning rate 2.048e-5 (1e-8 times 2048) after 200 updates of warm-up, beta 5000, a fifth
of the prompts dropped. Not in it: the published code mirrors images at random, and optimizes with
Adafactor to save memory; here AdamW's moments are shared by the devices.

Not yet run on the real weights. Expected to take 8 GPUs of 80 GB at one pair each; the microbatch
must be a multiple of the number of devices, and `--dry_run` says what it takes on yours.

Variants, `--config=configs/dpo_sdxl.py:NAME[,NAME]`:
  lora       adapters of rank 8 on the attention, at a learning rate that is not published; one GPU
             of 80 GB is expected to do
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 2000

  # A folder in the diffusers layout, a hub id, or a single .safetensors file.
  config.model = config_dict.ConfigDict({
    "path": "stabilityai/stable-diffusion-xl-base-1.0",
    "tokenizer": "",  # folder or hub id; a single .safetensors file needs one
    "configs": "",  # those of a single file, if not the published ones
    "dtype": "bfloat16",  # of the UNet's computation
    "param_dtype": "bfloat16",  # of its weights that are not trained; changes no result
    "vae_dtype": "float32",  # that images are decoded in
    "remat": "dots",  # "none", "dots" or "full": compute blocks again, to save memory
  })
  config.lora = config_dict.ConfigDict({
    "rank": 0,  # 0 trains the layers' own weights
    "alpha": 1.0,
    "targets": "",  # every parameter of the UNet
    "form": "side",  # or "merged": one kernel for layer and adapter; docs/devices.md
  })

  # Devices: `data` share the batch, `fsdp` the batch and the large parameters; -1 is what is left.
  config.mesh = config_dict.ConfigDict({"data": 1, "fsdp": -1})

  # Of the evaluation, like the guidance: the loss sees the network without it, as published.
  config.process = config_dict.ConfigDict({
    "transition": "ddim",
    "num_steps": 50,
    "eta": 1.0,
  })
  config.guidance = config_dict.ConfigDict({"scale": 7.5})

  config.data = config_dict.ConfigDict({
    "source": "pairs.parquet",  # or .jsonl; data/preference_files.py has the format
    "ties": "drop",  # or "half" to keep them, with p = 0.5: neither image is the winner
    "max_bad_fraction": 0.01,  # more unreadable rows than this stop the run
    "prompt_dropout": 0.2,  # share of pairs that are trained with the empty prompt
    "resize": True,  # bring images to the size of the model, whatever their aspect ratio
  })

  # Pairs of one optimizer step, and of one gradient slice, of all devices together.
  config.batch = config_dict.ConfigDict({"num_examples": 2048, "microbatch": 8})

  config.method = config_dict.ConfigDict({
    "name": "dpo",
    "beta": 5000.0,  # of a mean over latents, so weaker than at 512 pixels
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  })

  config.optim = config_dict.ConfigDict({
    "learning_rate": 2.048e-5,
    "warmup_steps": 200,
    "max_grad_norm": 1.0,
    "weight_decay": 1e-2,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
  })
  config.ema_decay = 0.0  # 0 keeps no average

  config.evaluation = config_dict.ConfigDict({
    "source": "held_out.txt",
    # Prompts for curves and guard during the run, apart from those of the final comparison: a file,
    # or "" for a third of source, chosen by its text, where `every` is above 0.
    "validation": "",
    "num_images": 64,
    "rewards": ("clip",),
    "kwargs": ({"path": "PickScore_v1"},),  # the folder of a CLIPModel
    "seed": 1234,
    "every": 250,  # iterations; 0 evaluates at the end only
    "kl": False,  # the trajectory KL to the base model too; costs twice the sampling more
    "microbatch": 8,
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
  config.samples = config_dict.ConfigDict({"every": 250, "num_images": 8})
  config.checkpoint = config_dict.ConfigDict({"every": 50, "keep": 2})
  config.log = config_dict.ConfigDict({"wandb_project": ""})  # "" does not log there

  for name in variant.split(",") if variant else ():
    if name not in VARIANTS:
      raise ValueError(
        f"configs/dpo_sdxl.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}"
      )
    VARIANTS[name](config)
  return config


def _lora(config):
  config.lora.update({"rank": 8, "alpha": 8.0, "targets": r"(to_q|to_k|to_v|to_out_0)$"})
  config.mesh.update({"data": -1, "fsdp": 1})
  config.optim.learning_rate = 1e-4


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_examples": 4, "microbatch": 2})
  config.evaluation.update({"num_images": 2, "microbatch": 2, "every": 0})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


VARIANTS = {"lora": _lora, "quicktest": _quicktest}
