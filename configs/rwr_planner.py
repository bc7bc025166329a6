"""Reward-weighted regression on the `planner` world (RWR in Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=configs/rwr_planner.py --workdir=runs/rwr_planner

Variants, `--config=configs/rwr_planner.py:NAME[,NAME]`:
  sparse     the best tenth of the plans, with equal weights
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "euler", "num_steps": 10}
  rewards = ("planner_success", "planner")
  config = common.world(
    "planner", num_iterations=60, learning_rate=1e-3, process=process, rewards=rewards
  )
  sizes = {"num_records": 16, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner", by="sample")
  config.method = {
    "name": "rwr",
    "gamma": 2.0,  # of the weights exp(gamma reward)
    "refresh": 1,  # iterations between refreshes of the policy that samples
  }
  return common.with_variants(config, "configs/rwr_planner.py", variant, VARIANTS)


VARIANTS = {
  "sparse": {"method": {"name": "rwr_sparse", "share": 0.1, "refresh": 1}},
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
