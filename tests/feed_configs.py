"""Configs of feeds that have none in configs/ yet, for the tests of several devices."""

import importlib.util
import pathlib

from ml_collections import config_dict

DDPO = pathlib.Path(__file__).resolve().parent.parent / "configs" / "ddpo.py"


def get_config(name: str) -> config_dict.ConfigDict:
  spec = importlib.util.spec_from_file_location("ddpo_config", DDPO)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {"stored_pairs": _stored_pairs, "rollout_pairs": _rollout_pairs}[name](
    module.get_config("quicktest,full")
  )


def _stored_pairs(config):
  config.method = {"name": "dpo", "beta": 100.0, "time_weight": "half"}
  config.data = {
    "source": "",  # the tests say
    "ties": "drop",
    "max_bad_fraction": 0.0,
    "prompt_dropout": 0.5,
    "resize": False,
  }
  config.batch = {"num_examples": 16, "microbatch": 8}
  return config


def _rollout_pairs(config):
  config.method = {"name": "d3po", "beta": 1.0, "clip_range": 0.1}
  config.batch.update({"num_prompts": 8, "images_per_prompt": 2, "microbatch": 16})
  return config
