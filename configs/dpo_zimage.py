"""Diffusion-DPO on Z-Image (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=dpo_zimage --workdir=runs/dpo_zimage \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

`dpo_sd35` with adapters on the attention.

Not yet run on the real weights.

Variants, `--config=dpo_zimage:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.dpo(flows.Z_IMAGE)
  config.process.num_steps = 50
  return common.with_variants(config, "configs/dpo_zimage.py", variant, VARIANTS)


VARIANTS = {"quicktest": flows.QUICKTEST_DPO}
