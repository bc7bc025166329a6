"""DDPO on the embedded `shapes` model (Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=ddpo --workdir=runs/ddpo

On two CPU cores 2 min 39 s to 2 min 52 s. Score on 384 images of test prompts 0.347, 0.361 and
0.356 with seeds 0, 1 and 2 against the base model's 0.274; the 95 % intervals of the gain are
[+0.029, +0.106], [+0.028, +0.137] and [+0.049, +0.114].

`:long`, 51,200 images, takes 54 CPU minutes (37 on 2 cores): on all held-out prompts and in an
earlier version from 0.246 to 0.518, gain [+0.209, +0.328], and images with every fact right from
9 % to 27 %, seed 0. The other variants have not been run at full length.

Variants, `--config=ddpo:NAME[,NAME]`:
  long            eleven times the iterations, at half the learning rate
  lora            adapters of rank 16 on the attention, instead of its own weights
  full            every parameter of the UNet is trained
  per_prompt      running statistics of each prompt's rewards, as in ddpo-pytorch
  score_function  DDPO-SF: plain REINFORCE, one update a rollout
  quicktest       two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.shapes(num_iterations=18, learning_rate=1.5e-3)
  sizes = {"num_records": 32, "group_size": 8, "microbatch": 32}
  common.online(config, "shapes/train", **sizes, reward="shapes")
  # The last steps decide little here, and their gradients, inversely proportional to the noise,
  # would drown the others'.
  config.batch.timestep_range = (0.0, 0.7)
  # Or per_prompt, group, batch or leave_one_out, each with its own fields: labels/advantages.py.
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {
    "name": "ddpo",
    # Of the ratio of log-probabilities averaged over D latent dimensions: 1e-3 allows a log-ratio
    # of half a nat at D = 512. Stable Diffusion at 512 pixels, D = 16384, takes 1e-4.
    "clip_range": 1e-3,
    # What a nat of KL to the reference costs, in units of the reward; 0 does not compute it.
    "kl_weight": 0.0,
  }
  return common.with_variants(config, "configs/ddpo.py", variant, VARIANTS)


VARIANTS = {
  "long": {
    "num_iterations": 200,
    "optim.learning_rate": 7e-4,
    "samples.every": 50,
    "checkpoint.every": 25,
  },
  "lora": common.lora_shapes(),
  "full": {"lora.targets": "", "optim.learning_rate": 5e-4},
  "per_prompt": {"advantage": common.per_prompt(buffer_size=32)},
  "score_function": {
    "method": {"name": "ddpo_sf", "kl_weight": 0.0},
    "batch.updates_per_epoch": 1,  # it has no ratio to correct a second update
  },
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
