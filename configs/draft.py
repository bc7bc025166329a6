"""Direct reward fine-tuning on the embedded `shapes` model: DRaFT and its relatives.

  python -m jaxalign.main --config=draft --workdir=runs/draft

The gradient of a learned, differentiable reward goes through the last steps of the sampler (Clark
et al. 2023, arXiv:2309.17400).

On one CPU core about 1.5 minutes. Over seeds 0 to 2 DRaFT-1 and its variants `lv`, `align_prop` and
`refl` gain +0.476 to +0.798 of the learned reward on held-out prompts, every interval above +0.29,
and +0.013 to +0.092 of the judge (0.246 at the base); docs/methods.md has them by seed.

`guarded` ends after iteration 48 with the checkpoint of iteration 18: judge +0.074, 95 % interval
[+0.023, +0.124], learned reward +0.608, seed 0. `whole` and `lora` have not been run at full
length. All figures are of all held-out prompts, before validation and test were apart, and of the
noise of that version.

Variants, `--config=draft:NAME[,NAME]`:
  whole       through every step (DRaFT)
  lv          through the last step, from several fresh noisings (DRaFT-LV)
  align_prop  through a random number of last steps (AlignProp, arXiv:2310.03739)
  refl        through one prediction at a random step (ReFL, arXiv:2304.05977)
  lora        adapters of rank 16 on the attention, instead of its own weights
  guarded     four times as long, until the judge has not risen for five evaluations
  quicktest   two iterations in seconds, to see that everything works
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  config = common.shapes(num_iterations=30, learning_rate=1e-3)
  sizes = {"num_examples": 32, "microbatch": 16}
  common.direct(config, "shapes/train", **sizes, reward="shapes_learned")
  config.method = {
    "name": "draft",
    "num_grad_steps": 1,  # K of DRaFT-K; 0 is the whole chain
    "kl_weight": 0.0,  # what a nat of KL to the base model costs, over the same steps
  }
  return common.with_variants(config, "configs/draft.py", variant, VARIANTS)


# The paper of AlignProp: steps normal around 8 of 50, with a deviation of 5.
ALIGN_PROP = {"mean_grad_steps": 4.0, "std_grad_steps": 1.0, "kl_weight": 0.0}
# Of the chain; the paper of ReFL: the last quarter of 40 steps. No gradient above the target.
REFL = {"step_range": (0.5, 1.0), "target": 10.0}
VARIANTS = {
  "whole": {"method.num_grad_steps": 0},
  "lv": {"method": {"name": "draft_lv", "num_noises": 2}},
  "align_prop": {"method": {"name": "align_prop", **ALIGN_PROP}},
  "refl": {"method": {"name": "refl", **REFL}},
  "lora": common.lora_shapes(),
  "guarded": {
    "num_iterations": 120,
    "evaluation.every": 6,
    "guard.action": "stop",
    "guard.patience": 5,
  },
  "quicktest": common.quicktest(num_examples=4, microbatch=2),
}
