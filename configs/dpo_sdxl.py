"""Diffusion-DPO on Stable Diffusion XL (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=dpo_sdxl --workdir=runs/dpo_sdxl \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

All weights on stored pairs, such as Pick-a-Pic's, with the published hyper-parameters: 2048 pairs
an update, learning rate 2.048e-5 (1e-8 times 2048) after 200 updates of warm-up, beta 5000, a fifth
of the prompts dropped. Not in it: the published code mirrors images at random, and optimizes with
Adafactor to save memory; here AdamW's moments are shared by the devices.

Not yet run on the real weights. Expected to take 8 GPUs of 80 GB at one pair each; the microbatch
must be a multiple of the number of devices, and `--dry_run` says what it takes on yours.

Variants, `--config=dpo_sdxl:NAME[,NAME]`:
  lora       adapters of rank 8 on the attention, at a learning rate that is not published; one GPU
             of 80 GB is expected to do
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, dpo_sd15


def get_config(variant: str = "") -> config_dict.ConfigDict:
  # At 1024 pixels the same beta is weaker, as it is of a mean over latents.
  config = dpo_sd15.get_config()
  config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
  config.model.remat = "dots"
  config.mesh.update({"data": 1, "fsdp": -1})
  config.batch.microbatch = 8
  config.optim.warmup_steps = 200
  return common.with_variants(config, "configs/dpo_sdxl.py", variant, VARIANTS)


VARIANTS = dpo_sd15.VARIANTS
