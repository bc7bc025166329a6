"""Reward-weighted regression on the `gaussian` world, where the right answer is known (2305.13301).

  python -m jaxalign.main --config=rwr_gaussian --workdir=runs/rwr_gaussian

Samples of the reference, weighted by exp(gamma reward): the optimum is the reference tilted by it,
that of `configs/ddpo_gaussian.py` at beta = 1 / gamma.

At gamma = 1 mean (0.813, -0.366) and standard deviations (0.791, 0.573) are right. Seeds 0, 1 and
2, 12 s of a core each, learn (0.804, -0.367) (0.779, 0.570); (0.804, -0.368) (0.781, 0.569); and
(0.805, -0.365) (0.783, 0.561). `sparse` has not been run at full length.

Variants, `--config=rwr_gaussian:NAME[,NAME]`:
  sparse     the best tenth of the samples, fitted again in every iteration: no known optimum
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "ddim", "num_steps": 192, "eta": 1.0}
  rewards = ("gaussian_quadratic",)
  config = common.world(
    "gaussian", num_iterations=200, learning_rate=0.04, process=process, rewards=rewards
  )
  sizes = {"num_records": 32, "group_size": 64, "microbatch": 2048}
  common.online(config, "gaussian/train", **sizes, reward="gaussian_quadratic", by="sample")
  # Samples come from the reference for ever: `refresh` iterations would make them the policy's.
  config.method = {"name": "rwr", "gamma": 1.0, "refresh": 0}
  config.optim.update({"b1": 0.9, "max_grad_norm": 1e9, "decay_steps": 200})
  return common.with_variants(config, "configs/rwr_gaussian.py", variant, VARIANTS)


VARIANTS = {
  "sparse": {"method": {"name": "rwr_sparse", "share": 0.1, "refresh": 1}},
  "quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2),
}
