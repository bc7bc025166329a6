"""Online DPO on the `planner` world (arXiv:2402.04792).

  python -m jaxalign.main --config=online_dpo_planner --workdir=runs/online_dpo_planner

Of eight plans of a record the best and the worst become a pair, and Diffusion-DPO learns from it.

Trained on `planner`, judged by `planner_success` too, on 384 plans of test records, without noise.
Seeds 0, 1 and 2, about 50 s of a CPU core each: success 0.549 to 0.643, 0.625 and 0.628, 95 %
intervals of the gain [+0.062, +0.125], [+0.049, +0.104] and [+0.047, +0.109]; `planner` 0.598 to
0.625, 0.625 and 0.618, [+0.010, +0.044], [+0.014, +0.042] and [+0.006, +0.036]. `iterative` has not
been run at full length.

Variants, `--config=online_dpo_planner:NAME[,NAME]`:
  iterative  a new reference every 20 iterations
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.planner_by_sample(num_iterations=40, learning_rate=1e-4)
  config.ema_decay = 0.9
  sizes = {"num_records": 64, "group_size": 8, "microbatch": 256}
  common.online(config, "planner/train", **sizes, reward="planner", by="sample")
  config.method = {
    "name": "online_dpo",
    "beta": 500.0,
    "temperature": 0.0,  # of the annotator; at 0 the better plan always wins
    "refresh": 0,  # iterations between new references; 0 keeps the base model
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 16,  # noise levels that the log-ratio of a pair is averaged over
  }
  return common.with_variants(config, "configs/online_dpo_planner.py", variant, VARIANTS)


VARIANTS = {
  "iterative": {"method.refresh": 20},
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
