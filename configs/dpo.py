"""Preference optimisation on stored pairs: Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.recipes.shapes_preferences --output=runs/pairs --num_pairs=20480
  python -m jaxalign.main --config=dpo --workdir=runs/dpo

On one CPU core 4 minutes, with 20480 sampled pairs of which 43 % are ties. Held-out score 0.293,
0.293 and 0.291 with seeds 0, 1 and 2 against the base model's 0.246; the 95 % intervals of the gain
are [+0.021, +0.071], [+0.021, +0.074] and [+0.020, +0.070], at less than 2 nats of KL. `:ipo`:
0.281, 0.297 and 0.282, [+0.003, +0.067], [+0.018, +0.082] and [+0.007, +0.066]. The other variants
have not been run at full length. The scores are of all held-out prompts, before validation and test
were apart, and of the noise of that version.

Variants, `--config=dpo:NAME[,NAME]`:
  ipo        the loss of IPO (arXiv:2310.12036) on the same log-ratios
  lora       adapters of rank 16 on the attention, instead of its own weights
  full       every parameter of the UNet is trained
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  # A gradient is mostly noise: without momentum and decay, steps of this length lead both images
  # of a pair away from where their errors are small, and hardly apart.
  config = common.shapes(num_iterations=60, learning_rate=5e-4)
  config.optim.update({"b1": 0.9, "warmup_steps": 5, "decay_steps": 60})
  common.stored_pairs(config, "runs/pairs/pairs.parquet", num_examples=192, microbatch=32)
  config.method = {
    "name": "dpo",
    # As in the published code, which takes 2000 to 5000 for Stable Diffusion at 512 pixels. The
    # error is a mean over latent dimensions, 32 times fewer here.
    "beta": 100.0,
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  }
  config.samples.every = 50
  config.checkpoint.every = 25
  return common.with_variants(config, "configs/dpo.py", variant, VARIANTS)


VARIANTS = {
  "ipo": {"method": {"name": "ipo", "tau": 10.0, "time_weight": "half", "num_draws": 1}},
  "lora": common.lora_shapes(),
  "full": {"lora.targets": "", "optim.learning_rate": 3e-4},
  "quicktest": common.quicktest(num_examples=4, microbatch=2),
}
