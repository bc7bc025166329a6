"""RAFT on the `planner` world (Dong et al. 2023, arXiv:2304.06767).

  python -m jaxalign.main --config=raft_planner --workdir=runs/raft_planner

Of sixteen plans of a record the two best are learned from, by the loss that made the model.

Trained on `planner`, judged by `planner_success` too, on 384 plans of test records, without noise.
Seeds 0, 1 and 2, about 50 s of a CPU core each: success 0.549 to 0.669, 0.669 and 0.664, 95 %
intervals of the gain [+0.065, +0.174], [+0.062, +0.177] and [+0.062, +0.167]; `planner` 0.598 to
0.648, 0.643 and 0.639, [+0.021, +0.080], [+0.018, +0.072] and [+0.016, +0.066].

Variants, `--config=raft_planner:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.planner_by_sample(num_iterations=60, learning_rate=1e-4)
  sizes = {"num_records": 64, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner", by="sample")
  # As in configs/rwr_planner.py, the policy that samples is refreshed now and then.
  config.method = {"name": "raft", "keep": 2, "refresh": 20}
  return common.with_variants(config, "configs/raft_planner.py", variant, VARIANTS)


VARIANTS = {
  "quicktest": {
    **common.quicktest(num_records=2, group_size=2, microbatch=2), "method.keep": 1
  }
}
