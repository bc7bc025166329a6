"""DiffusionNFT on Stable Diffusion 3.5 medium (Zheng et al. 2025, arXiv:2509.16117).

  python -m jaxalign.main --config=nft_sd35 --workdir=runs/nft_sd35 \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

PickScore at 512 pixels with the published hyper-parameters: images are sampled without guidance or
noise, in 10 steps, by an old copy of the adapters that follows them; 48 prompts of 24 images an
iteration. Each sample is noised to one level of the network's own, where the published code takes
those of the rollout, and sampled by Euler's method, where that takes a solver of second order.

Not yet run on the real weights.

Variants, `--config=nft_sd35:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.adapters(flows.SD35, num_iterations=1000, learning_rate=3e-4)
  config.process = {"transition": "euler", "num_steps": 10}
  config.guidance.scale = 1.0
  sizes = {"num_records": 48, "group_size": 24, "microbatch": 24}
  common.online(config, "prompts.txt", **sizes, reward="clip", by="sample")
  config.reward.kwargs = common.PICKSCORE
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {
    "name": "nft",
    "mix": 0.1,  # of the policy in the positive and the negative one; 1 with GenEval's reward
    "advantage_limit": 5.0,  # at which a sample is optimal
    "reference_weight": 1e-4,  # of the squared difference to the base model's prediction
    # After iteration n the old policy keeps min(decay_rate n, decay_max) of itself.
    "decay_rate": 1e-3,
    "decay_max": 0.5,
  }
  config.ema_decay = 0.9
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 30})
  config.samples.every = 30
  return common.with_variants(config, "configs/nft_sd35.py", variant, VARIANTS)


VARIANTS = {"quicktest": common.quicktest_sd15(num_records=2, group_size=2, microbatch=2)}
