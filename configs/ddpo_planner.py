"""DDPO on the `planner` world: plans of a point among obstacles, no text, no images (2305.13301).

  python -m jaxalign.main --config=ddpo_planner --workdir=runs/ddpo_planner

The model has learned from demonstrators of whom some walk through obstacles; the reward is smooth
in clearance, length, smoothness and the distance of both ends, and `planner_success`, which is not
trained on, says whether a plan arrives without touching anything.

Variants, `--config=ddpo_planner:NAME[,NAME]`:
  lora       adapters of rank 8 on every layer
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "flow_sde", "num_steps": 10, "noise_level": 0.3}
  rewards = ("planner_success", "planner")
  config = common.world(
    "planner", num_iterations=40, learning_rate=2e-4, process=process, rewards=rewards
  )
  sizes = {"num_records": 16, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner")
  config.batch.timestep_fraction = 0.5
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {"name": "ddpo", "clip_range": 1e-2, "kl_weight": 0.0}
  return common.with_variants(config, "configs/ddpo_planner.py", variant, VARIANTS)


VARIANTS = {
  "lora": {"lora.rank": 8, "lora.targets": ".", "optim.learning_rate": 1e-3},
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
