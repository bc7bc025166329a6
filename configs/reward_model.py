"""Trains a reward model on preference pairs: CLIP, fine-tuned as PickScore is (arXiv:2305.01569).

  python -m jaxalign.recipes.shapes_preferences --output=preferences/train --num_pairs=20480
  python -m jaxalign.recipes.shapes_preferences --output=preferences/held_out --split=held_out \\
    --seed=1 --num_pairs=4096
  python -m jaxalign.main --config=reward_model --workdir=runs/reward_model

About 40 minutes on 2 CPU cores that other work shared, 16 of them for the warm start. Of 4096
pairs of held-out prompts, 2276 have a preferred image: the model agrees with 70.4 % of these labels
(95 % interval 68.6 to 72.3), 79 % of the 89.3 % that the judge itself reaches, and with the judge
on 74.5 % of the 2142 pairs whose scores differ. Were no pair a tie, as in the plain model of
Bradley and Terry, it would reach 62.3 % of 74.5 %, that is 84 %. Half as many steps on preferences
reached 69.7 %; on the pairs that it learns from it agrees with about 79 %, so that more pairs would
help more than more steps. The result is the model in worlds/assets/shapes_reward.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict({"flow": "reward_model", "seed": 0})
  # A folder of a CLIPModel to start from; empty fits one to scenes of the shapes world first.
  config.init_from = ""
  # As data.preference_files reads them. Ties are dropped, or kept as labels of 0.5 ("half").
  train = "preferences/train/pairs.parquet"
  config.data = {**common.files(train), "image_size": 64, "ties": "drop"}
  # Pairs of the same columns; empty measures no accuracy.
  config.held_out = common.anything("preferences/held_out/pairs.parquet")
  # The config.json of the model that is fitted from nothing, as transformers writes it.
  config.model = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 64,
    "logit_scale_init_value": 2.6592,  # ln(1 / 0.07), CLIP's own
    "text_config": common.text_encoder(),
    "vision_config": VISION,
  }
  config.warm_start = {
    # A quarter of the batch is drawn; each prompt brings three that differ from it in one fact.
    "batches": {"batch_size": 64, "group_size": 4},
    # Pixels that bent images are displaced by, and how soft any image may become.
    "augmentation": {"bend": (1.5, 3.0), "max_blur": 1.0},
    "fit": common.fit(num_steps=1500, learning_rate=1e-3),
  }
  fit = common.fit(num_steps=2000, learning_rate=5e-4, weight_decay=1e-2, warmup_steps=50)
  config.preferences = {
    "batches": {"batch_size": 96, "max_shift": 4},
    "logit_scale": 1.0,  # where it starts
    "fit": {**fit, "log_every": 20, "checkpoint_every": 200},
  }
  return config


VISION = {
  "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 384,
  "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64,
  "patch_size": 8,  # of the size of an object's details
  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}
