"""DRaFT on Stable Diffusion 1.5 (Clark et al. 2023, arXiv:2309.17400).

  python -m jaxalign.main --config=draft_sd15 --workdir=runs/draft_sd15 \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt \\
    --config.reward.kwargs="({'path': 'PICKSCORE_FOLDER'},)" \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

The gradient of PickScore, or of another CLIPModel folder, through the last step of the sampler
(DRaFT-1): AdamW at 4e-4 and 50 steps as in the paper. Batch, rank and number of iterations are
ours.

Not yet run on the real weights. Expected to fit one GPU of 40 GB at this microbatch, which must be
a multiple of the number of devices; `--dry_run` says what it takes on yours.

Variants, `--config=draft_sd15:NAME[,NAME]`:
  lv         through the last step, from several fresh noisings (DRaFT-LV)
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.sd15(num_iterations=500, learning_rate=4e-4)
  config.lora.update({"rank": 8, "alpha": 8.0})
  config.process.eta = 0.0  # deterministic, so that its KL to the base model is not defined
  common.direct(config, "prompts.txt", num_examples=32, microbatch=4, reward="clip")
  config.reward.kwargs = common.PICKSCORE
  config.method = {
    "name": "draft",
    "num_grad_steps": 1,  # K of DRaFT-K; 0 is the whole chain
    "kl_weight": 0.0,  # what a nat of KL to the base model costs, over the same steps
  }
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 50})
  config.evaluation.microbatch = 4
  config.samples.every = 50
  config.checkpoint.every = 25
  return common.with_variants(config, "configs/draft_sd15.py", variant, VARIANTS)


VARIANTS = {
  "lv": {"method": {"name": "draft_lv", "num_noises": 2}},
  "quicktest": common.quicktest_sd15(num_examples=4, microbatch=2),
}
