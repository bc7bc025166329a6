"""DRaFT on Stable Diffusion 1.5 (Clark et al. 2023, arXiv:2309.17400).

  python -m jaxalign.main --config=configs/draft_sd15.py --workdir=runs/draft_sd15 \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

The gradient of PickScore, or of another CLIPModel folder, through the last step of the sampler
(DRaFT-1): AdamW at 4e-4 and 50 steps as in the paper. Batch, rank and number of iterations are
ours.

Not yet run on the real weights. Expected to fit one GPU of 40 GB at this microbatch, which must be
a multiple of the number of devices; `--dry_run` says what it takes on yours.

Variants, `--config=configs/draft_sd15.py:NAME[,NAME]`:
  lv         through the last step, from several fresh noisings (DRaFT-LV)
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 500

  # A folder in the diffusers layout, a hub id, or a single .safetensors file.
  config.model = config_dict.ConfigDict({
    "path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "tokenizer": "",  # folder or hub id; a single .safetensors file needs one
    "configs": "",  # those of a single file, if not the published ones
    "dtype": "bfloat16",  # of the UNet's computation
    "param_dtype": "bfloat16",  # of its weights that are not trained; changes no result
    "vae_dtype": "float32",  # that images are decoded in
    "remat": "none",  # "none", "dots" or "full": compute blocks again, to save memory
  })
  config.lora = config_dict.ConfigDict({
    "rank": 8,
    "alpha": 8.0,  # an adapter counts alpha / rank times
    # Layers to adapt: a regular expression over their slash-joined paths.
    "targets": r"(to_q|to_k|to_v|to_out_0)$",
    "form": "side",  # or "merged": one kernel for layer and adapter; docs/devices.md
  })

  # Devices: `data` share the batch, `fsdp` the batch and the large parameters; -1 is what is left.
  config.mesh = config_dict.ConfigDict({"data": -1, "fsdp": 1})

  config.process = config_dict.ConfigDict({
    "transition": "ddim",
    "num_steps": 50,
    "eta": 0.0,  # deterministic, so that its KL to the base model is not defined
  })
  # Classifier-free guidance, which the gradient goes through too.
  config.guidance = config_dict.ConfigDict({"scale": 7.5})

  # One prompt a line, or .jsonl objects with a "prompt".
  config.data = config_dict.ConfigDict({"source": "prompts.txt"})

  # Prompts of one optimizer step, and of one gradient slice, of all devices together.
  config.batch = config_dict.ConfigDict({"num_examples": 32, "microbatch": 4})

  # Learned, because the gradient goes through it.
  config.reward = config_dict.ConfigDict({
    "names": ("clip",),
    "weights": (1.0,),
    "kwargs": ({"path": "PickScore_v1"},),  # the folder of a CLIPModel
    "normalize": "none",
  })

  config.method = config_dict.ConfigDict({
    "name": "draft",
    "num_grad_steps": 1,  # K of DRaFT-K; 0 is the whole chain
    "kl_weight": 0.0,  # what a nat of KL to the base model costs, over the same steps
  })

  config.optim = config_dict.ConfigDict({
    "learning_rate": 4e-4,
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
    "kwargs": ({"path": "PickScore_v1"},),
    "seed": 1234,
    "every": 50,  # iterations; 0 evaluates at the end only
    "kl": False,  # the trajectory KL to the base model too; costs twice the sampling more
    "microbatch": 4,
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
  config.samples = config_dict.ConfigDict({"every": 50, "num_images": 8})
  config.checkpoint = config_dict.ConfigDict({"every": 25, "keep": 2})
  config.log = config_dict.ConfigDict({"wandb_project": ""})  # "" does not log there

  for name in variant.split(",") if variant else ():
    if name not in VARIANTS:
      raise ValueError(
        f"configs/draft_sd15.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}"
      )
    VARIANTS[name](config)
  return config


def _lv(config):
  config.method = {"name": "draft_lv", "num_noises": 2}


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_examples": 4, "microbatch": 2})
  config.evaluation.update({"num_images": 2, "microbatch": 2, "every": 0})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


VARIANTS = {"lv": _lv, "quicktest": _quicktest}
