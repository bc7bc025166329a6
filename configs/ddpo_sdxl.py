"""DDPO on Stable Diffusion XL (Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=ddpo_sdxl --workdir=runs/ddpo_sdxl \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt

Images that compress well as JPEG. No hyper-parameters are published for XL: these are those of
configs/ddpo_sd15.py.

Not yet run on the real weights. Expected to fit one GPU of 80 GB at this microbatch, which must be
a multiple of the number of devices; `--dry_run` says what it takes on yours.

Variants, `--config=ddpo_sdxl:NAME[,NAME]`:
  full       every parameter of the UNet is trained; it takes several GPUs, with mesh.fsdp above 1
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common, ddpo_sd15


def get_config(variant: str = "") -> config_dict.ConfigDict:
  # The same clip range, of a mean over latent dimensions, D = 65536 at 1024 pixels, allows four
  # times the log-ratio that it does in Stable Diffusion 1.5.
  config = ddpo_sd15.get_config()
  config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
  config.batch.microbatch = 2
  config.evaluation.microbatch = 2
  return common.with_variants(config, "configs/ddpo_sdxl.py", variant, VARIANTS)


VARIANTS = ddpo_sd15.VARIANTS
