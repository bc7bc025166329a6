"""Flow-GRPO on Stable Diffusion 3.5 medium (Liu et al. 2025, arXiv:2505.05470).

  python -m jaxalign.main --config=flow_grpo_sd35 --workdir=runs/flow_grpo_sd35 \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

PickScore at 512 pixels with the published hyper-parameters: the rectified flow as an SDE of noise
level 0.7 in 10 steps, guidance 4.5 in rollout and update, 48 prompts of 24 images an iteration in
two updates, adapters of rank 32 on both streams' attention. Not in it: the published penalty on
the squared distance of the means, which is no KL in nats (`method.kl_weight` weighs one), and the
ramp of the average's decay.

Not yet run on the real weights. For one H100 `--dry_run --topology=h100` foresees 31 GiB in the
rollout and 47 GiB in the update at a microbatch of 8, for each of eight 31 and 39.

Variants, `--config=flow_grpo_sd35:NAME[,NAME]`:
  cps        noise that keeps coefficients (arXiv:2509.05952), at its level 0.8, and guidance 1
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = of_model(common.SD35)
  return common.with_variants(config, "configs/flow_grpo_sd35.py", variant, VARIANTS)


def of_model(model: common.Flow) -> config_dict.ConfigDict:
  """Flow-GRPO of any flow transformer, without variants."""
  config = common.flow(model, num_iterations=1000, learning_rate=3e-4)
  config.lora.form = "merged"
  config.process = {"transition": "flow_sde", "num_steps": 10, "noise_level": 0.7}
  sizes = {"num_records": 48, "group_size": 24, "microbatch": 24}
  common.online(config, "prompts.txt", **sizes, reward="clip")
  config.reward.kwargs = common.PICKSCORE
  config.batch.updates_per_epoch = 2
  config.batch.timestep_range = (0.0, 0.99)
  config.advantage = {"name": "group_global_std", "epsilon": 1e-4, "limit": 5.0}
  config.method = {
    "name": "ddpo",
    "clip_range": 1e-4,  # of the ratio of log-probabilities averaged over D = 65536 latents
    "kl_weight": 0.0,
  }
  # The bounds of bfloat16: the first is the clip range, as no gap may decide what is clipped.
  config.exactness.update({"max_log_prob_gap": 1e-4, "max_share": 0.05})
  config.ema_decay = 0.9
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 30})
  config.samples.every = 30
  return config


QUICKTEST = common.quicktest_sd15(
  num_records=2, group_size=2, microbatch=2, updates_per_epoch=2
)
VARIANTS = {
  "cps": {
    "process": {"transition": "cps", "num_steps": 10, "noise_level": 0.8},
    "guidance.scale": 1.0,
  },
  "quicktest": QUICKTEST,
}
