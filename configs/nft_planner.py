"""DiffusionNFT on the `planner` world (Zheng et al. 2025, arXiv:2509.16117).

  python -m jaxalign.main --config=nft_planner --workdir=runs/nft_planner

Plans are sampled without noise, by an old copy of the policy that follows it slowly; no likelihood
is computed.

Trained on `planner`, judged by `planner_success` too, on 384 plans of test records, without noise.
Seeds 0, 1 and 2, about 100 s of a CPU core each: success 0.549 to 0.812, 0.789 and 0.807, 95 %
intervals of the gain [+0.203, +0.323], [+0.174, +0.302] and [+0.195, +0.320]; `planner` 0.598 to
0.643, 0.648 and 0.645, [+0.014, +0.076], [+0.020, +0.081] and [+0.017, +0.078].

Variants, `--config=nft_planner:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.planner_by_sample(num_iterations=100, learning_rate=1e-4)
  sizes = {"num_records": 64, "group_size": 16, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner", by="sample")
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {
    "name": "nft",
    "mix": 1.0,  # of the policy in the positive and the negative one
    # At this advantage a plan is optimal. 5 in the published code, where few plans come near it.
    "advantage_limit": 1.5,
    "reference_weight": 0.05,  # of the squared difference to the base model's prediction
    # After iteration n the old policy keeps min(decay_rate n, decay_max) of itself.
    "decay_rate": 1e-3,
    "decay_max": 0.5,
  }
  return common.with_variants(config, "configs/nft_planner.py", variant, VARIANTS)


VARIANTS = {"quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2)}
