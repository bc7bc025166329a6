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

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = of_model(common.SD35)
  return common.with_variants(config, "configs/dpo_sd35.py", variant, VARIANTS)


def of_model(model: common.Flow) -> config_dict.ConfigDict:
  """Diffusion-DPO of any flow transformer, without variants."""
  config = common.flow(model, num_iterations=2000, learning_rate=1e-4)
  config.process = {"transition": "euler", "num_steps": 28}
  common.stored_pairs(config, "pairs.parquet", num_examples=128, microbatch=8)
  config.data.resize = "crop"
  config.method = {
    "name": "dpo",
    "beta": 2000.0,
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  }
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 250})
  config.samples.every = 250
  config.checkpoint.every = 50
  return config


VARIANTS = {"quicktest": common.quicktest_sd15(num_examples=4, microbatch=2)}
