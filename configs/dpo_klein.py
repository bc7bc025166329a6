"""Diffusion-DPO on FLUX.2-klein base 4B (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=dpo_klein --workdir=runs/dpo_klein \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

`dpo_sd35` with beta 100: at the 2000 of others the training of this model has been seen to diverge
(Flow-Factory, issue 108). Train the base model; the one of four steps is distilled.

Not yet run on the real weights.

Variants, `--config=dpo_klein:NAME[,NAME]`:
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, flows


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = flows.dpo(flows.KLEIN)
  config.process.num_steps = 50
  config.method.beta = 100.0
  return common.with_variants(config, "configs/dpo_klein.py", variant, VARIANTS)


VARIANTS = {"quicktest": flows.QUICKTEST_DPO}
