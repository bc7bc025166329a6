"""MixGRPO on the `planner` world (Li et al. 2025, arXiv:2507.21802).

  python -m jaxalign.main --config=mix_grpo_planner --workdir=runs/mix_grpo_planner

Noise and gradients in four steps of ten, a window that moves along the chain; the other steps are
deterministic, and each reward would have advantages of its own. The window moves in every
iteration: one that stays trains its steps at the cost of the others, whose weights are the same.

Judged with noise in every step, on 384 plans of test records. Seeds 0, 1 and 2, about 40 s of a CPU
core each: success 0.518 to 0.630, 0.594 and 0.607, 95 % intervals of the gain [+0.065, +0.159],
[+0.034, +0.117] and [+0.039, +0.138]; `planner` 0.012 to 0.099, 0.091 and 0.076, [+0.062, +0.113],
[+0.054, +0.106] and [+0.035, +0.092].

Variants, `--config=mix_grpo_planner:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "flow_sde", "num_steps": 10, "noise_level": 0.3}
  rewards = ("planner_success", "planner")
  config = common.world(
    "planner", num_iterations=40, learning_rate=1e-4, process=process, rewards=rewards
  )
  sizes = {"num_records": 16, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner")
  config.advantage = {
    "name": "group",
    "per_reward": True,  # advantages of every reward by itself, then their weighted sum
    "epsilon": 1e-4,
    "ddof": 0,
    "limit": 5.0,
  }
  config.method = {
    "name": "mix_grpo",
    "clip_range": 1e-2,
    "window_size": 4,  # steps
    "window_stride": 1,  # steps that the window moves on
    "window_every": 1,  # iterations between two moves
  }
  return common.with_variants(config, "configs/mix_grpo_planner.py", variant, VARIANTS)


VARIANTS = {
  "quicktest": {
    **common.quicktest(num_records=2, group_size=2, microbatch=2), "method.window_size": 2
  }
}
