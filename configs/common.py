"""What configs share: every field explained once, the models, the kinds of data, and the variants.

A config starts from a model, `shapes`, `sd15`, another `world` or one of `flows`, adds the fields
of its data, `online`, `stored` or `direct`, and says what is its own. Any field can also be set by
a flag, `--config.optim.learning_rate=1e-4`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

Config = config_dict.ConfigDict
PICKSCORE = ({"path": "PickScore_v1"},)  # kwargs of the reward "clip": the folder of a CLIPModel


def shapes(*, num_iterations: int, learning_rate: float) -> Config:
  """A run that aligns the embedded `shapes` model, without its method and data."""
  config = config_dict.ConfigDict()
  config.flow = "align"
  config.seed = 0
  config.num_iterations = num_iterations
  _add_model(config)
  config.optim = {
    "learning_rate": learning_rate,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    # Bias correction lets the first gradients of a momentum of 0.9 count several times, and a run
    # of a few steps is made of those.
    "b1": 0.0,
    "b2": 0.99,
    "epsilon": 1e-8,
    "warmup_steps": 0,  # optimizer steps
    "decay_steps": 0,  # optimizer steps until a cosine decay ends at 0; 0 is none
  }
  # Of an average of the trained parameters, at the end of every iteration; it is then what is
  # evaluated, sampled and exported. 0 keeps none.
  config.ema_decay = 0.0
  _add_evaluation(config)
  return config


def sd15(*, num_iterations: int, learning_rate: float) -> Config:
  """A run that aligns Stable Diffusion 1.5 on GPUs, without its method, data and rewards."""
  config = shapes(num_iterations=num_iterations, learning_rate=learning_rate)
  config.model.update({
    "path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",  # changes no result, unless adapters are merged
    "vae_dtype": "float32",  # that images are decoded in
  })
  config.process.num_steps = 50
  config.guidance.scale = 7.5
  config.optim = {
    "learning_rate": learning_rate,
    "max_grad_norm": 1.0,
    "weight_decay": 1e-2,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
  }
  config.evaluation.update({
    "source": "held_out.txt",
    "validation": "",
    "num_samples": 64,
    "rewards": (),  # no default: each config has its own
    "microbatch": 8,
  })
  config.guard.gold = ""
  config.samples.num_samples = 8
  return config


def world(
  name: str,
  *,
  num_iterations: int,
  learning_rate: float,
  process: Mapping[str, Any],
  rewards: tuple[str, ...],
) -> Config:
  """A run that aligns an embedded world without texts and images, "gaussian" or "planner"."""
  config = shapes(num_iterations=num_iterations, learning_rate=learning_rate)
  config.model = {"path": name}
  config.lora.targets = ""
  config.process = process
  config.evaluation.update({
    "source": f"{name}/test",
    "validation": f"{name}/validation",
    "rewards": rewards,
    "kl": True,  # is nearly free here
    "microbatch": 192,
    "features": "default",  # of its kind of samples
  })
  config.guard.gold = rewards[0]
  config.samples.update({"every": num_iterations // 2, "num_samples": 192})
  config.checkpoint.every = num_iterations // 2
  return config


def planner_by_sample(*, num_iterations: int, learning_rate: float) -> Config:
  """A run on the `planner` world that learns from plans sampled without noise."""
  config = world(
    "planner",
    num_iterations=num_iterations,
    learning_rate=learning_rate,
    process={"transition": "euler", "num_steps": 10},
    rewards=("planner_success", "planner"),
  )
  config.optim.update({"b1": 0.9, "decay_steps": num_iterations})
  return config


def _add_model(config: Config) -> None:
  """The model, what of it is trained, and how it samples."""
  config.model = {
    # "shapes", a folder in the diffusers layout, a hub id, or a single .safetensors file.
    "path": "shapes",
    # Folder or hub id. A single file has neither: it needs a tokenizer, and takes the configs
    # published for its kind unless others are named.
    "tokenizer": "",
    "configs": "",
    "dtype": "float32",  # of the UNet's computation; bfloat16 is for GPUs
    "param_dtype": "float32",  # of its weights that are not trained; those that are stay float32
    "remat": "none",  # "dots" and "full" save memory: blocks are computed again for the gradient
  }
  config.lora = {
    "rank": 0,  # 0 trains the layers' own weights
    "alpha": 16.0,  # an adapter counts alpha / rank times
    # Layers to train or adapt: a regular expression over their slash-joined paths. With rank 0, ""
    # trains every parameter of the UNet.
    "targets": r"(to_q|to_k|to_v|to_out_0)$",
    # "side" is exact; "merged" has one kernel for layer and adapter, which is faster.
    # docs/devices.md says what its rounding costs.
    "form": "side",
  }
  # Devices: `data` share the batch, `fsdp` the batch and the large parameters; -1 is what is left.
  config.mesh = {"data": -1, "fsdp": 1}
  config.process = {
    "transition": "ddim",
    "num_steps": 8,
    # 1 is the ancestral sampler, 0 the deterministic one. That has no density: sampled images
    # cannot be trained on, and its KL to the base model is not defined.
    "eta": 1.0,
  }
  # Classifier-free guidance, wherever the run samples: in the rollout and its update alike, through
  # the gradient of a direct method, in the evaluation. The loss on stored pairs sees the network
  # without it, as published. It doubles the cost; 1 is none.
  config.guidance = {"scale": 1.0}


def _add_evaluation(config: Config) -> None:
  """What is measured, shown, guarded against and saved."""
  config.evaluation = {
    # Of the final comparison: nothing is chosen on these prompts.
    **files("shapes/test"),
    # During the run, for curves, guard, and your own tuning. Or a file, or "" for a third of the
    # source where `every` is above 0: a prompt's own text decides on which side it is.
    "validation": anything("shapes/validation"),
    "num_samples": 384,
    "rewards": ("shapes", "shapes_correct", "shapes_learned"),
    "seed": 1234,
    "every": 0,  # iterations; 0 evaluates at the end only
    "kl": False,  # the trajectory KL to the base model too; costs twice the sampling more
    "microbatch": 32,
    "features": "pixels",  # of images, that their diversity is measured by
  }
  # Over-optimisation, looked for at every evaluation during the run. 0 and "" set no bound.
  config.guard = {
    "action": "off",  # "warn", or "stop", which ends the run with the best checkpoint on `gold`
    "gold": "shapes",  # a reward of the evaluation, best one that is not trained on
    "patience": 3,  # evaluations in a row without a new best
    "kl_budget": 0.0,  # nats of trajectory KL to the base model
    "diversity_floor": 0.0,  # share of the base model's diversity
  }
  # After the first update: layers that match, gradients everywhere, samples that move.
  config.self_check = {"action": "stop"}  # or "warn", or "off"
  config.samples = {"every": 8, "num_samples": 16}  # iterations
  config.checkpoint = {"every": 5, "keep": 2}  # iterations
  config.log = {"wandb_project": ""}  # "" does not log there


def online(
  config: Config,
  source: str,
  *,
  num_records: int,
  group_size: int,
  microbatch: int,
  reward: str,
  by: str = "step",
) -> None:
  """Adds what learning from sampled and scored images needs; `source` are their prompts.

  `by` is "step" for methods that train the steps of trajectories, "sample" for those that train on
  finished samples.
  """
  config.data = files(source)  # .txt with one prompt a line, or rows with a "prompt"
  # All sizes are global and per iteration.
  config.batch = {
    "num_records": num_records,  # drawn in turn, so several times from a shorter file
    "group_size": group_size,
    # Images per rollout program, and of a gradient slice the transitions (D3PO: the images in its
    # pairs), of all devices together.
    "microbatch": microbatch,
    "updates_per_epoch": 1,  # optimizer steps per pass over the images
    "num_epochs": 1,  # passes over the images
    # Images are shuffled within this many parts of a microbatch; 0 is one for each device, so that
    # none leaves its device. A number that all your machines divide gives the same run on each.
    "shards": 0,
  }
  if by == "step":
    # Trained are, of the steps with noise, those in this range (0 the first, at the highest noise
    # level, to 1), and of these a random fraction for each image.
    config.batch.update({"timestep_range": (0.0, 1.0), "timestep_fraction": 1.0})
    # How far rollout and update may differ about a log-probability, before the run is ended. It is
    # nothing to the first update after a rollout; a gap as large as the clip range would decide
    # what is clipped in later ones. docs/exactness.md has what was measured, on CPUs.
    config.exactness = {
      "max_log_prob_gap": 1e-5,  # of any transition
      "tolerance": 1e-5,  # a gap that counts as none
      "max_share": 0.0,  # of the transitions may have a larger one
    }
  _add_reward(config, reward)
  # For rewards that run on the host; those that run on the device are scored there.
  config.reward_pool = {
    "num_threads": 1,  # that score images
    "num_retries": 0,  # attempts after an exception in a reward, as of a server that is asked
    "retry_seconds": 1.0,  # before the first of them; each later wait is twice as long
    # Share of an iteration's images on which a reward may abstain before the run is stopped.
    "max_abstained": 0.0,
  }


def files(source: str) -> dict[str, Any]:
  """A source of data: a file, a folder, a pattern such as "data/*.parquet", or a list of these."""
  return {
    "source": anything(source),
    # Which column is what, {"prompt": "caption"}, or a name of jaxalign/data/layouts.py.
    "columns": anything(None),
  }


def anything(default: Any) -> config_dict.FieldReference:
  """A field that takes values of several types."""
  return config_dict.FieldReference(default, field_type=object)


def stored(config: Config, source: str, *, num_examples: int, microbatch: int) -> None:
  """Adds what learning from stored preferences needs, without what its kind of labels asks for."""
  config.data = {
    **files(source),  # data/preference_files.py has the format
    "max_bad_fraction": 0.01,  # more unreadable rows than this stop the run
    "condition_dropout": 0.0,  # share of examples that are trained with the empty prompt
    # Or bring images to the size of the model: "crop", as published, or "squeeze"; no plans.
    "resize": anything(False),
  }
  # Examples of one optimizer step, and of one gradient slice, of all devices together.
  config.batch = {"num_examples": num_examples, "microbatch": microbatch}


def stored_pairs(config: Config, source: str, *, num_examples: int, microbatch: int) -> None:
  """Adds what learning from stored pairs needs."""
  stored(config, source, num_examples=num_examples, microbatch=microbatch)
  config.data.ties = "drop"  # or "half" to keep them, with p = 0.5: neither image is the winner


def direct(
  config: Config, source: str, *, num_examples: int, microbatch: int, reward: str
) -> None:
  """Adds what the gradient of a learned reward through the sampler needs; `source` are prompts."""
  config.data = files(source)  # .txt with one prompt a line, or rows with a "prompt"
  # Prompts of one optimizer step, and of one gradient slice, of all devices together.
  config.batch = {"num_examples": num_examples, "microbatch": microbatch}
  _add_reward(config, reward)


def _add_reward(config: Config, name: str) -> None:
  config.reward = {
    "names": (name,),  # built in, or your own function as "package.module:function"
    "weights": (1.0,),
    "kwargs": ({},),  # of each reward
    "normalize": "none",  # or "batch": each to mean 0 and std 1 before it is weighted
  }


def per_prompt(buffer_size: int) -> dict[str, Any]:
  """Advantages by running statistics of each prompt's rewards, as in ddpo-pytorch."""
  return {
    "name": "per_prompt",
    "buffer_size": buffer_size,  # rewards remembered of each prompt
    "min_count": 16,  # with fewer of them, statistics of the batch are used
    "epsilon": 1e-6,
    "limit": 5.0,  # advantages are clipped to this
  }


def fit(*, num_steps: int, learning_rate: float, **changes: Any) -> dict[str, Any]:
  """Fitting a network from nothing or on pairs: optimizer, and how often it logs and saves."""
  return {
    "num_steps": num_steps,
    "learning_rate": learning_rate,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.99,
    "epsilon": 1e-8,
    "warmup_steps": 100,
    "log_every": 50,  # steps
    "checkpoint_every": 500,  # steps
    **changes,
  }


def text_encoder() -> dict[str, Any]:
  """config.json of the `shapes` world's text transformer, as transformers writes it."""
  return {
    "model_type": "clip_text_model",
    "vocab_size": 0,  # replaced by the size of the tokenizer's vocabulary
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,  # read as: the largest id is the end of the text
    "pad_token_id": 1,
  }


def lora_shapes() -> dict[str, Any]:
  """Variant: adapters of rank 16 on the attention of the embedded model, at a rate of their own."""
  return {"lora.rank": 16, "optim.learning_rate": 5e-3}


def quicktest(**batch: int) -> dict[str, Any]:
  """Variant: two iterations on batches of a few, to see that everything works."""
  return {
    "num_iterations": 2,
    "process.num_steps": 4,
    "evaluation.num_samples": 4,
    "evaluation.microbatch": 2,
    "samples.every": 1,
    "samples.num_samples": 2,
    "checkpoint.every": 1,
    **{f"batch.{size}": value for size, value in batch.items()},
  }


def quicktest_sd15(**batch: int) -> dict[str, Any]:
  """Variant: `quicktest` for large models, evaluated at the end alone."""
  return {**quicktest(**batch), "evaluation.num_samples": 2, "evaluation.every": 0}


def with_variants(
  config: Config, file: str, variant: str, variants: Mapping[str, Mapping[str, Any]]
) -> Config:
  """Changes the config by each variant that `variant` names, comma-separated, in that order.

  A variant is what flags would set: {"optim.learning_rate": 1e-4}. A dict replaces its section.
  """
  config.lock()  # refuses a field that is not there
  for name in variant.split(",") if variant else ():
    if name not in variants:
      raise ValueError(f"{file}: unknown variant {name!r}; known: {', '.join(variants)}")
    for path, value in variants[name].items():
      section, _, field = path.rpartition(".")
      (config[section] if section else config)[field] = value
  config.unlock()
  return config
