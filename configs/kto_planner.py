"""Diffusion-KTO on stored thumbs, on the `planner` world (Li et al. 2024, arXiv:2404.04465).

  python -m jaxalign.recipes.planner_preferences --output=runs/plan_pairs --num_pairs=8192
  python -m jaxalign.main --config=kto_planner --workdir=runs/kto_planner

A plan is good that won its comparison by the reward `planner`, and bad that lost; the loss never
sees the two together, and ties are left out.

Judged by `planner_success` too, on 384 plans of test records, without noise. Seeds 0, 1 and 2, 30
to 35 s of a CPU core each and 10 s for the pairs: success 0.549 to 0.682 with each of them, 95 %
intervals of the gain [+0.089, +0.180], [+0.089, +0.180] and [+0.086, +0.180]; `planner` 0.598 to
0.658, 0.655 and 0.664, [+0.034, +0.086], [+0.034, +0.081] and [+0.041, +0.092].

Variants, `--config=kto_planner:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.planner_by_sample(num_iterations=60, learning_rate=1e-4)
  common.stored(config, "runs/plan_pairs/pairs.parquet", num_examples=512, microbatch=512)
  config.data.threshold = 0.5  # good above this mean probability to win, bad below it
  config.method = {
    "name": "kto",
    "beta": 100.0,  # as that of configs/kto.py
    "time_weight": "half",  # or "elbo", log-ratios in nats
    # At 1 and 1 the mean log-ratio sinks to -0.010 and not to -0.002, and 48 % of the plans gain of
    # the reward and not 71 % (seed 3, validation records).
    "weight_good": 1.3,
    "weight_bad": 0.7,
  }
  return common.with_variants(config, "configs/kto_planner.py", variant, VARIANTS)


VARIANTS = {"quicktest": common.quicktest(num_examples=4, microbatch=2)}
