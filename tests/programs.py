"""Every program that a run compiles, of shapes alone: nothing is computed, no device is needed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import device_jobs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from jax._src.cudnn import fused_attention_stablehlo as fused

from jaxalign import methods, streams, system
from jaxalign.benchmarks import workload
from jaxalign.data import examples, preferences
from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.distributed import placement, sharding
from jaxalign.evaluation import precision
from jaxalign.labels.base import Scores
from jaxalign.models.families import stable_diffusion
from jaxalign.models.model import Model
from jaxalign.rewards import combine, scoring
from jaxalign.training import batching
from jaxalign.training.feeds import Program, base, online

# Odd on purpose, which fused attention has refused: 63 positions and 7 tokens. Sizes of heads are
# multiples of 8, or it would not be chosen.
LATENTS = (9, 7)
TOKENS = 7
NUM_STEPS, SLICES, HELD = 3, 2, 2  # HELD microbatches are what an iteration keeps
LEAST = "least"  # a family of this file, see `model`
# By method: the config that its other sections are of, and its own arguments.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  "ddpo": ("ddpo", {"clip_range": 1e-4, "kl_weight": 0.1}),
  "ddpo_sf": ("ddpo", {"kl_weight": 0.0}),
  "d3po": ("d3po", {"beta": 0.1, "clip_range": 0.1}),
  "dpo": ("dpo", {"beta": 100.0, "time_weight": "half", "num_draws": 1}),
  "ipo": ("dpo", {"tau": 10.0, "time_weight": "elbo", "num_draws": 2}),
  "draft": ("draft", {"num_grad_steps": 2, "kl_weight": 0.1}),
  "draft_lv": ("draft", {"num_noises": 2}),
  "align_prop": ("draft", {"mean_grad_steps": 1.0, "std_grad_steps": 1.0, "kl_weight": 0.0}),
  "refl": ("draft", {"step_range": (0.5, 1.0), "target": 0.5}),
  "kto": ("kto", {"beta": 1.0, "time_weight": "half", "weight_good": 1.0, "weight_bad": 1.0}),
  "online_dpo": (
    "online_dpo_planner",
    {"beta": 1.0, "temperature": 0.0, "refresh": 2, "time_weight": "half", "num_draws": 1},
  ),
  "nft": (
    "nft_planner",
    {
      "mix": 1.0, "advantage_limit": 5.0, "reference_weight": 1e-4, "decay_rate": 1e-3,
      "decay_max": 0.5,
    },
  ),
  "mix_grpo": (
    "mix_grpo_planner",
    {"clip_range": 1e-4, "window_size": 1, "window_stride": 1, "window_every": 1},
  ),
  "raft": ("raft_planner", {"keep": 1, "refresh": 2}),
  "rwr": ("rwr_planner", {"gamma": 1.0, "refresh": 1}),
  "rwr_sparse": ("rwr_planner", {"share": 0.5, "refresh": 1}),
}
# By sampler: its own arguments.
SAMPLERS: dict[str, dict[str, Any]] = {"chain": {}, "best_of_n": {"n": 2}}
# What is trained, by name: what the section `lora` has beside these.
LORA = {"alpha": 16.0, "targets": r"(to_q|to_k|to_v|to_out_0)$"}
TRAINED: dict[str, dict[str, Any]] = {
  "side": {"rank": 4, "form": "side"},
  "merged": {"rank": 4, "form": "merged"},
  "full": {"rank": 0, "targets": ""},
}


@contextlib.contextmanager
def described(platform: str, capability: tuple[int, int] = (9, 0)) -> Iterator[pytest.MonkeyPatch]:
  """Layers trace for "gpu" (with that compute capability), "tpu" or "cpu"; arrays are shapes.

  JAX's questions about the local GPU and its cuDNN are answered too. What is changed in the block
  by the patch that it gives is put back at its end.
  """

  def version(text):
    return tuple(int(part) for part in text.split("."))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "is_described", lambda mesh: True)
    patch.setattr(placement, "platform", lambda: platform)
    patch.setattr(placement, "compute_capability", lambda: capability)
    patch.setattr(fused, "check_compute_capability", lambda text: capability >= version(text))
    patch.setattr(
      fused, "is_cuda_compute_capability_equal", lambda text: capability == version(text)
    )
    patch.setattr(fused, "check_cudnn_version", lambda: 91000)
    yield patch


def model(kind, folder, **unet) -> stable_diffusion.StableDiffusion:
  """A small model of a kind, with shapes for parameters; its tokenizers go to the empty `folder`.

  `LEAST` is a 1.x with one resolution, the quickest to trace that has attention to texts. `unet`
  are fields of its config. It computes in bfloat16.
  """
  found = small_models.KINDS["sd1" if kind == LEAST else kind]
  configs = {name: dict(config) for name, config in found.items()}
  heads = 1 if configs["unet"]["attention_head_dim"] == 2 else [1, 2]  # of 8, or 8 and 8
  configs["unet"] |= {"sample_size": list(LATENTS), "attention_head_dim": heads}
  if kind == LEAST:
    configs["unet"] |= {
      "block_out_channels": [8],
      "down_block_types": ["CrossAttnDownBlock2D"],
      "up_block_types": ["UpBlock2D"],
    }
  configs["unet"] |= unet
  tokenizers = {"tokenizer_folder": small_models.write_tokenizer(folder / "tokenizer")}
  if "text_encoder_2" in configs:
    tokenizers["tokenizer_2_folder"] = small_models.write_tokenizer(folder / "tokenizer_2")
  for name in configs.keys() & {"text_encoder", "text_encoder_2"}:
    configs[name]["max_position_embeddings"] = TOKENS
  made = stable_diffusion.build(**configs, **tokenizers)
  made = made.with_compute(dtype="bfloat16", remat="none")
  return made.with_params(made.networks.param_shapes())


def make_work(model, method="ddpo_sf", trained="side", mesh=None) -> workload.Workload:
  """A method's run of a model; `trained` is a name of `TRAINED`."""
  name, kwargs = METHODS[method]
  config = workload.load_config(name)
  config.method = {"name": method, **kwargs}
  config.lora = {**LORA, **TRAINED[trained]}
  config.process = {"transition": "ddim", "num_steps": NUM_STEPS, "eta": 1.0}
  config.guidance.scale = 5.0
  if name == "draft":
    config.reward.names = (f"{device_jobs.__name__}:soft_brightness",)
  elif "reward" in config:
    del config["reward"]  # on the host
  model = model if isinstance(model, Model) else stable_diffusion.as_model(model)
  return workload.make(config, model, mesh)


def update(work: workload.Workload, batch: int = 2) -> Program:
  """An optimizer step of several slices."""
  data, selection = data_of(work, batch)
  return Program("update", work.update_fn, (work.state, work.frozen, data, selection, 0, 0, 0))


def others(work: workload.Workload, batch: int = 2) -> list[Program]:
  """What else a run and its evaluation compile for the model."""
  sys, params = work.system, work.state.params
  table = sys.pipeline.table
  images = _array(batch, 2, *sys.model.sample_shape, dtype=np.uint8)
  x_0 = _array(batch, *sys.model.latent_shape)
  decode = placement.jit(sys.pipeline.decode, sys.mesh)
  return [
    rollout(work, batch),
    Program("condition_fn", sys.condition_fn, (work.frozen, _ids(work, batch))),
    Program("kl_fn", sys.kl_fn, (params, work.frozen, _sampled(work, batch), table)),
    Program("encode_fn", sys.encode_fn, (work.frozen, images, 0, 0, 0)),
    Program("decode", decode, (work.frozen, x_0)),
  ]


def floor(work: workload.Workload, batch: int = 2) -> Program:
  """What rounding alone makes of a KL and a log-ratio, measured once by a run in bfloat16."""
  measure = precision.make_measure_fn(work.system)
  args = (work.state.params, work.frozen, _sampled(work, batch), streams.key_shape())
  return Program("floor", measure, args)


def sample(work: workload.Workload, batch: int = 2) -> Program:
  """What `jaxalign.sample` runs, which is given its noise."""
  sys = work.system
  x_T = _array(batch, *sys.model.latent_shape)
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = (work.state.params, work.frozen, _ids(work, batch), x_T, key, sys.pipeline.table)
  return Program("sample", placement.jit(sys.sample, sys.mesh), args)


def rollout(work: workload.Workload, batch: int = 2) -> Program:
  """A microbatch of trajectories and their images."""
  noise = (0, streams.number("rollout"), 0, 0, None, work.system.pipeline.table)
  args = (work.state.params, work.frozen, _ids(work, batch), *noise)
  return Program("sample_fn", work.system.sample_fn, args)


def steered(work: workload.Workload, sampler: str, batch: int = 2) -> Program:
  """The same by another sampler, which goes by a reward on the device."""
  rewards = combine.make_total((f"{device_jobs.__name__}:soft_brightness",))
  sys = work.system.with_sampler({"name": sampler, **SAMPLERS[sampler]}, rewards)
  query = jax.eval_shape(lambda: sys.tokenize([{"prompt": "a red circle"}] * batch).query)
  tokens = system.Asked(_ids(work, batch), query)
  noise = (0, streams.number("rollout"), 0, 0, None, sys.pipeline.table)
  return Program(sampler, sys.sample_fn, (work.state.params, sys.frozen, tokens, *noise))


def scored(work: workload.Workload, batch: int = 2) -> Program:
  """Samples judged by a reward on the device, where they lie."""
  sys = work.system
  total = combine.make_total((f"{device_jobs.__name__}:soft_brightness",))
  on_mesh = scoring.OnMesh(scoring.placed(total, sys.mesh), sys.model.modality, sys.mesh)
  query = total.encode([{"prompt": "a red circle"}] * batch)
  samples = _array(batch, *sys.model.sample_shape)
  return Program("scored", on_mesh.score_fn, (total.params, samples, query))


def _ids(work, batch):
  return jax.eval_shape(lambda: workload.tokens(work.system, batch))


def _cond(work, batch):
  return jax.eval_shape(work.system.condition_fn, work.frozen, _ids(work, batch))


def _array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _sampled(work, batch):
  """What the rollout returns, without tracing it."""
  model = work.system.model
  x = _array(NUM_STEPS + 1, batch, *model.latent_shape)
  rolled = rollout_lib.Rollout(x=x, log_prob=_array(NUM_STEPS, batch))
  samples, x_0 = _array(batch, *model.sample_shape), _array(batch, *model.latent_shape)
  return system.Sampled(rolled, _cond(work, batch), samples, x_0)


# What an iteration holds, as a feed leaves it on the mesh, and which of it each slice takes.


def data_of(work, batch):
  """What an iteration of the method holds, and the selection of one update."""
  kind = work.data
  if isinstance(kind, methods.Records):
    return _inputs(work, batch)
  if isinstance(kind, methods.Stored):
    return _stored(work, batch)
  return _online(work, batch, kind)


def _online(work, batch, kind):
  sys, sampled = work.system, _sampled(work, batch)
  collect = online.collect if kind.by == "step" else online.collect_finished
  collected = jax.eval_shape(collect, [sampled] * HELD)
  collected = sharding.shaped(collected, online.collected_shardings(kind.by, sys.mesh))
  # Labels of the method itself, for groups of two.
  rows = _array(HELD * batch // 2, 2)
  ids = _array(rows.shape[0], dtype=np.int32)
  valid = _array(*rows.shape, dtype=np.bool_)
  scores = Scores(rows, {"reward": rows}, {"reward": _array()}, rows, ids, ids, valid)
  memory = jax.eval_shape(lambda: kind.memory(rows.shape[0]))
  labels = jax.eval_shape(kind.label, memory, scores, streams.key_shape())[1]
  number = _array(SLICES, batch, dtype=np.int32)
  selection = batching.Selection(number, number, _array(SLICES, batch, dtype=np.bool_))
  return (collected, sys.pipeline.table, labels.samples, labels.values), selection


def _stacked(work, part):
  held = jax.eval_shape(base.stack, [part] * HELD)
  return sharding.shaped(held, sharding.batch(work.system.mesh, axis=1))


def _stored(work, batch):
  # Of a record of two candidates, for the form of the examples that the method makes of it.
  options = {"ties": "drop"} if work.data.examples is examples.pairs else {"threshold": 0.5}
  made = work.data.examples(record_of_two(), **options)
  x_0 = _array(batch, *made.candidates.shape[1:], *work.system.model.latent_shape)
  labels = {name: _array(batch) for name in made.values}
  part = methods.Finished(x_0, _cond(work, batch).cond, labels)
  return _stacked(work, part), _array(SLICES, batch, dtype=np.int32)


def record_of_two():
  prob = np.array([[np.nan, 1.0], [0.0, np.nan]], np.float32)
  return preferences.Record({"prompt": "a prompt"}, (None, None), prob=prob)


def _inputs(work, batch):
  cond = _cond(work, batch)
  query = work.rewards.device.encode([{"prompt": "a red circle"}] * batch)
  own, query = _stacked(work, (cond.cond, query))
  data = methods.Inputs(cond._replace(cond=own), query)
  return data, _array(SLICES, batch, dtype=np.int32)
