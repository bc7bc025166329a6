"""DDPO on Stable Diffusion 1.5 (Black et al. 2023, arXiv:2305.13301).

  python -m jaxalign.main --config=ddpo_sd15 --workdir=runs/ddpo_sd15 \\
    --config.model.path=FOLDER --config.data.source=prompts.txt \\
    --config.evaluation.source=held_out.txt

Images that compress well as JPEG, the paper's first task, with the hyper-parameters of its PyTorch
reimplementation: LoRA of rank 4, 256 images an iteration in 4 updates, 50 steps, guidance 5 in
rollout and update. The prompts there are 45 names of animals.

Not yet run on the real weights. Expected to fit one GPU of 24 GB or more at this microbatch, which
must be a multiple of the number of devices; `--dry_run` says what it takes on yours.

Variants, `--config=ddpo_sd15:NAME[,NAME]`:
  full       every parameter of the UNet is trained, at the paper's learning rate
  quicktest  two iterations in little time, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.sd15(num_iterations=100, learning_rate=3e-4)
  config.optim.weight_decay = 1e-4
  config.lora.update({"rank": 4, "alpha": 4.0, "form": "merged"})
  config.guidance.scale = 5.0
  sizes = {"num_records": 256, "group_size": 1, "microbatch": 8}
  common.online(config, "prompts.txt", **sizes, reward="jpeg_compressibility")
  config.batch.updates_per_epoch = 4
  config.advantage = common.per_prompt(buffer_size=16)
  config.method = {
    "name": "ddpo",
    "clip_range": 1e-4,  # of the ratio of log-probabilities averaged over D = 16384 latents
    "kl_weight": 0.0,  # what a nat of KL to the base model costs; 0 does not compute it
  }
  # The bounds of bfloat16: the first is the clip range, as no gap may decide what is clipped.
  config.exactness.update({"max_log_prob_gap": 1e-4, "max_share": 0.05})
  config.evaluation.update({"rewards": ("jpeg_compressibility",), "every": 10})
  config.samples.every = 10
  return common.with_variants(config, "configs/ddpo_sd15.py", variant, VARIANTS)


VARIANTS = {
  "full": {"lora.rank": 0, "lora.targets": "", "optim.learning_rate": 1e-5},
  "quicktest": common.quicktest_sd15(num_records=4, microbatch=2, updates_per_epoch=2),
}
