"""Diffusion-DPO on Stable Diffusion 3.5 medium (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=dpo_sd35 --workdir=runs/dpo_sd35 \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

Adapters on stored pairs, the error of the velocity in the place of the noise's. Of flows there is
no one published setting: beta 2000 and the adapters of rank 32 are those of reimplementations
(verl-omni, Flow-Factory), 100 is another one's (Flow-GRPO's code).

Not yet run on the real weights. For one H100 `--dry_run --topology=h100` foresees 42 GiB.

Variants, `--config=dpo_sd35:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.dpo(flows.SD35)
  return common.with_variants(config, "configs/dpo_sd35.py", variant, VARIANTS)


VARIANTS = {"quicktest": flows.QUICKTEST_DPO}
