"""Reward-weighted regression on the `planner` world (RWR in Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=rwr_planner --workdir=runs/rwr_planner

Trained on `planner`, judged by `planner_success` too, on 384 plans of test records, without noise.
Seeds 0, 1 and 2, about 65 s of a CPU core each: success 0.549 to 0.661, 0.654 and 0.659, 95 %
intervals of the gain [+0.062, +0.161], [+0.052, +0.156] and [+0.060, +0.159]; `planner` 0.598 to
0.644, 0.640 and 0.644, [+0.020, +0.074], [+0.015, +0.070] and [+0.019, +0.074]. `sparse` has not
been run at full length.

Variants, `--config=rwr_planner:NAME[,NAME]`:
  sparse     the best tenth of the plans, with equal weights
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.planner_by_sample(num_iterations=60, learning_rate=1e-4)
  sizes = {"num_records": 64, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner", by="sample")
  config.method = {
    "name": "rwr",
    "gamma": 8.0,  # of the weights exp(gamma reward)
    # Iterations between refreshes of the policy that samples. One that is fitted to its own samples
    # at once, again and again, takes their errors for the truth.
    "refresh": 20,
  }
  return common.with_variants(config, "configs/rwr_planner.py", variant, VARIANTS)


VARIANTS = {
  "sparse": {"method": {"name": "rwr_sparse", "share": 0.1, "refresh": 20}},
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
