"""MixGRPO on the `planner` world (Li et al. 2025, arXiv:2507.21802).

  python -m jaxalign.main --config=configs/mix_grpo_planner.py --workdir=runs/mix_grpo_planner

Noise and gradients in three steps of ten, which move along the chain; the other steps are
deterministic. Each reward has advantages of its own.

Variants, `--config=configs/mix_grpo_planner.py:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "flow_sde", "num_steps": 10, "noise_level": 0.7}
  rewards = ("planner_success", "planner")
  config = common.world(
    "planner", num_iterations=60, learning_rate=2e-4, process=process, rewards=rewards
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
    "window_size": 3,  # steps
    "window_stride": 1,  # steps that the window moves on
    "window_every": 8,  # iterations between two moves
  }
  return common.with_variants(config, "configs/mix_grpo_planner.py", variant, VARIANTS)


VARIANTS = {
  "quicktest": {
    **common.quicktest(num_records=2, group_size=2, microbatch=2),
    "method.window_every": 1,
  }
}
