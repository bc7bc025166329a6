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

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.flow_grpo(flows.SD35)
  return common.with_variants(config, "configs/flow_grpo_sd35.py", variant, VARIANTS)


VARIANTS = {
  "cps": {
    "process": {"transition": "cps", "num_steps": 10, "noise_level": 0.8},
    "guidance.scale": 1.0,
  },
  "quicktest": flows.QUICKTEST_GRPO,
}
