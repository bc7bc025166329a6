"""Flow-GRPO on Z-Image (Liu et al. 2025, arXiv:2505.05470).

  python -m jaxalign.main --config=flow_grpo_zimage --workdir=runs/flow_grpo_zimage \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

`flow_grpo_sd35` with this model's guidance 5, which is 6 elsewhere, and adapters on the attention.

Not yet run on the real weights.

Variants, `--config=flow_grpo_zimage:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.flow_grpo(flows.Z_IMAGE)
  return common.with_variants(config, "configs/flow_grpo_zimage.py", variant, VARIANTS)


VARIANTS = {"quicktest": flows.QUICKTEST_GRPO}
