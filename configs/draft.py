"""Direct reward fine-tuning on the embedded `shapes` model: DRaFT and its relatives.

  python -m jaxalign.main --config=configs/draft.py --workdir=runs/draft

The gradient of a learned, differentiable reward goes through the last steps of the sampler (Clark
et al. 2023, arXiv:2309.17400).

On one CPU core about 1.5 minutes. Gains on held-out prompts over seeds 0 to 2, learned reward and
judge (0.246 at the base); every interval of the learned reward is above +0.29:

  DRaFT-1    +0.732 +0.798 +0.704   +0.032 +0.042 +0.052
  lv         +0.476 +0.773 +0.746   +0.018 +0.027 +0.059
  align_prop +0.721 +0.784 +0.728   +0.055 +0.013 +0.057
  refl       +0.685 +0.786 +0.712   +0.073 +0.035 +0.092

`guarded` ends after iteration 48 with the checkpoint of iteration 18: judge +0.074, 95 % interval
[+0.023, +0.124], learned reward +0.608, seed 0. `whole` and `lora` have not been run at full
length. All figures are of all held-out prompts, before validation and test were apart, and of the
noise of that version.

Variants, `--config=configs/draft.py:NAME[,NAME]`:
  whole       through every step (DRaFT)
  lv          through the last step, from several fresh noisings (DRaFT-LV)
  align_prop  through a random number of last steps (AlignProp, arXiv:2310.03739)
  refl        through one prediction at a random step (ReFL, arXiv:2304.05977)
  lora        adapters of rank 16 on the attention, instead of its own weights
  guarded     four times as long, until the judge has not risen for five evaluations
  quicktest   two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = 30

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
    "eta": 1.0,  # 1 is the ancestral sampler, 0 the deterministic one
  })
  # Classifier-free guidance, which the gradient goes through too; 1 is none.
  config.guidance = config_dict.ConfigDict({"scale": 1.0})

  config.data = config_dict.ConfigDict({"source": "shapes/train"})

  # Prompts of one optimizer step, and of one gradient slice.
  config.batch = config_dict.ConfigDict({"num_examples": 32, "microbatch": 16})

  # Learned, because the gradient goes through it.
  config.reward = config_dict.ConfigDict({
    "names": ("shapes_learned",),
    "weights": (1.0,),
    "kwargs": ({},),
    "normalize": "none",
  })

  config.method = config_dict.ConfigDict({
    "name": "draft",
    "num_grad_steps": 1,  # K of DRaFT-K; 0 is the whole chain
    "kl_weight": 0.0,  # what a nat of KL to the base model costs, over the same steps
  })

  config.optim = config_dict.ConfigDict({
    "learning_rate": 1e-3,
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
      raise ValueError(f"configs/draft.py: unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    VARIANTS[name](config)
  return config


def _whole(config):
  config.method.num_grad_steps = 0


def _lv(config):
  config.method = {"name": "draft_lv", "num_noises": 2}


def _align_prop(config):
  config.method = {
    "name": "align_prop",
    "mean_grad_steps": 4.0,  # the paper: normal around 8 of 50, with a deviation of 5
    "std_grad_steps": 1.0,
    "kl_weight": 0.0,
  }


def _refl(config):
  config.method = {
    "name": "refl",
    "step_range": (0.5, 1.0),  # of the chain; the paper: the last quarter of 40 steps
    "target": 10.0,  # no gradient where the reward is above
  }


def _lora(config):
  config.lora.rank = 16
  config.optim.learning_rate = 5e-3


def _guarded(config):
  config.num_iterations = 120
  config.evaluation.every = 6
  config.guard.update({"action": "stop", "patience": 5})


def _quicktest(config):
  config.num_iterations = 2
  config.process.num_steps = 4
  config.batch.update({"num_examples": 4, "microbatch": 2})
  config.evaluation.update({"num_images": 4, "microbatch": 2})
  config.samples.update({"every": 1, "num_images": 2})
  config.checkpoint.every = 1


VARIANTS = {
  "whole": _whole,
  "lv": _lv,
  "align_prop": _align_prop,
  "refl": _refl,
  "lora": _lora,
  "guarded": _guarded,
  "quicktest": _quicktest,
}
