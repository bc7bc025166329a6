"""Flow-GRPO on FLUX.2-klein base 4B (Liu et al. 2025, arXiv:2505.05470).

  python -m jaxalign.main --config=flow_grpo_klein --workdir=runs/flow_grpo_klein \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

`flow_grpo_sd35` with guidance 4, without which this model is poor, adapters on the double blocks
and on the fused layers of the single ones, and a tenth of the clip range: at 1e-4 the training of
this model has been seen to oscillate (Flow-Factory, issue 108). Train the base model; the one of
four steps is distilled.

Not yet run on the real weights.

Variants, `--config=flow_grpo_klein:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.flow_grpo(flows.KLEIN)
  config.method.clip_range = 1e-5
  config.exactness.max_log_prob_gap = 1e-5  # no more than the clip range
  return common.with_variants(config, "configs/flow_grpo_klein.py", variant, VARIANTS)


VARIANTS = {"quicktest": flows.QUICKTEST_GRPO}
