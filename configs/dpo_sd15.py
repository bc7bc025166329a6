"""Diffusion-DPO on Stable Diffusion 1.5 (Wallace et al. 2023, arXiv:2311.12908).

  python -m jaxalign.main --config=dpo_sd15 --workdir=runs/dpo_sd15 \\
    --config.model.path=FOLDER --config.data.source=pairs.parquet \\
    --config.evaluation.source=held_out.txt \\
    --config.evaluation.kwargs="({'path': 'PICKSCORE_FOLDER'},)"

All weights on stored pairs, such as Pick-a-Pic's, with the published hyper-parameters: 2048 pairs
an update, 2000 updates, learning rate 2.048e-5 (1e-8 times 2048) after 500 updates of warm-up, beta
5000, a fifth of the prompts dropped. Not in it: the published code mirrors images at random. The
paper took about 24 hours on 16 A100.

Not yet run on the real weights. Expected to fit GPUs of 80 GB at 16 pairs each; the microbatch must
be a multiple of the number of devices, and `--dry_run` says what it takes on yours.

Variants, `--config=dpo_sd15:NAME[,NAME]`:
  lora       adapters of rank 8 on the attention, at a learning rate that is not published
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.sd15(num_iterations=2000, learning_rate=2.048e-5)
  config.optim.warmup_steps = 500
  config.lora.update({"alpha": 1.0, "targets": ""})  # every parameter of the UNet
  common.stored_pairs(config, "pairs.parquet", num_examples=2048, microbatch=16)
  config.data.update({"condition_dropout": 0.2, "resize": "crop"})
  config.method = {
    "name": "dpo",
    "beta": 5000.0,  # of a mean over latents: weaker at a larger image size
    "time_weight": "half",  # or "elbo", log-ratios in nats
    "num_draws": 1,  # noise levels that the log-ratio of a pair is averaged over
  }
  config.evaluation.update({"rewards": ("clip",), "kwargs": common.PICKSCORE, "every": 250})
  config.samples.every = 250
  config.checkpoint.every = 50
  return common.with_variants(config, "configs/dpo_sd15.py", variant, VARIANTS)


VARIANTS = {
  "lora": {
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.targets": r"(to_q|to_k|to_v|to_out_0)$",
    "mesh": {"data": -1, "fsdp": 1},
    "optim.learning_rate": 1e-4,
  },
  "quicktest": common.quicktest_sd15(num_examples=4, microbatch=2),
}
