"""Online DPO on the `gaussian` world, where the right answer is known (arXiv:2402.04792).

  python -m jaxalign.main --config=online_dpo_gaussian --workdir=runs/online_dpo_gaussian

Pairs of the policy's own samples, with the probability sigmoid(difference of rewards) that the
better one is chosen: the optimum is the reference tilted by exp(reward / beta), that of
`configs/ddpo_gaussian.py`.

Mean (0.813, -0.366) and standard deviations (0.791, 0.573) are right at beta = 1. Seeds 0, 1 and 2,
10 s of a CPU core each, learn (0.811, -0.366) (0.802, 0.580); (0.810, -0.365) (0.802, 0.580); and
(0.811, -0.366) (0.803, 0.580).

Variants, `--config=online_dpo_gaussian:NAME[,NAME]`:
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  process = {"transition": "ddim", "num_steps": 64, "eta": 1.0}
  rewards = ("gaussian_quadratic",)
  config = common.world(
    "gaussian", num_iterations=200, learning_rate=0.02, process=process, rewards=rewards
  )
  sizes = {"num_records": 512, "group_size": 2, "microbatch": 1024}
  common.online(config, "gaussian/train", **sizes, reward="gaussian_quadratic", by="sample")
  config.method = {
    "name": "online_dpo",
    "beta": 1.0,  # of log-ratios in nats
    "temperature": 1.0,  # of the annotator; at 0 no margin is large enough
    "refresh": 0,  # iterations between new references
    # Draws are noise to the log-ratio of a pair, and one draw would pull it far below its truth.
    "time_weight": "elbo",
    "num_draws": 64,
  }
  config.optim.update({"b1": 0.9, "max_grad_norm": 1e9, "decay_steps": 200})
  return common.with_variants(config, "configs/online_dpo_gaussian.py", variant, VARIANTS)


VARIANTS = {"quicktest": common.quicktest(num_records=2, group_size=2, microbatch=2)}
