"""D3PO on the embedded `shapes` model (Yang et al. 2023, arXiv:2311.13231).

  python -m jaxalign.main --config=d3po --workdir=runs/d3po

Direct preference optimisation of sampled trajectories: of each prompt the best and the worst of a
few images that started from the same noise.

On one CPU core 3 minutes. Held-out score 0.306, 0.322 and 0.285 with seeds 0, 1 and 2 against the
base model's 0.246; the 95 % intervals of the gain are [+0.024, +0.094], [+0.028, +0.127] and
[+0.000, +0.076]. The variants have not been run at full length. The scores are of all held-out
prompts, before validation and test were apart, and of the noise of that version.

Variants, `--config=d3po:NAME[,NAME]`:
  lora       adapters of rank 16 on the attention, instead of its own weights
  quicktest  two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.shapes(num_iterations=18, learning_rate=1.5e-3)
  # Of the images of a prompt the best and the worst become a pair.
  sizes = {"num_records": 64, "group_size": 4, "microbatch": 32}
  common.online(config, "shapes/train", **sizes, reward="shapes")
  config.batch.timestep_range = (0.0, 0.7)  # for the reason given in configs/ddpo.py
  config.method = {
    "name": "d3po",
    # Of log-probabilities averaged over latent dimensions, 512 here: it is 1/512 of a nat's beta.
    "beta": 50.0,
    "clip_range": 0.1,  # of each step's probability ratio to the base model
  }
  return common.with_variants(config, "configs/d3po.py", variant, VARIANTS)


VARIANTS = {
  "lora": common.lora_shapes(),
  "quicktest": common.quicktest(num_records=4, group_size=2, microbatch=4),
}
