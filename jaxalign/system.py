"""A model made ready to sample: network, policy, process and guidance in one jitted program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, steering, streams
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.diffusion import log_ratios, transitions
from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.diffusion.kernel import Kernel
from jaxalign.diffusion.schedules import StepTable
from jaxalign.distributed import placement, sharding
from jaxalign.models import families
from jaxalign.models.adapters import policy as policy_lib
from jaxalign.models.model import Model, Tokens
from jaxalign.pipeline import Pipeline
from jaxalign.rewards import combine
from jaxalign.steering import Sampled, binding
from jaxalign.types import Array, Key, Params, Record

# The section `lora` of a model that is sampled as it is.
NO_LORA = {"rank": 0, "alpha": 1.0, "targets": ""}
# The section `sampler` of a model that is sampled as its policy is trained.
CHAIN = {"name": "chain"}


class Asked(NamedTuple):
  """The tokens of records, and what the sampler's rewards want to know of them; `[m, ...]` each."""

  tokens: Tokens
  query: Any


@dataclasses.dataclass(frozen=True, eq=False)
class System:
  """What `train`, `sample` and `evaluate` share, so that all of them sample alike.

  Attributes:
    mesh: the devices; batches are cut over them and parameters lie there by rule (`sharding`).
    model: what is sampled, as it was opened.
    guidance: the section of the config, with what the model says where it says nothing.
    pipeline: what methods compose.
    policy: the trained parameters as initialised, and how they enter the network.
    frozen: `{"base", "reference"}`, the model's components but for the denoiser and, if the sampler
      has rewards, `"rewards"`; an argument of every program.
    sampler: how samples are drawn, the chain by default.
    rewards: what the sampler ranks by, or None.
    sample: pure `(params, frozen, tokens [m, ...], x_T [m, *D], key, table) -> Sampled`, tokens as
      from `tokenize`.
    sample_fn: jitted `(params, frozen, tokens [m, ...], seed, name, i, j, start, table) ->
      Sampled`; all noise is `streams.stream(seed, name, i, j)`, whose name comes as its number.
      Sample k starts from the noise `start[k]` of the m that are drawn, from its own where `start`
      is None. `table` are the steps, `pipeline.table` or others of the same model.
    condition_fn: jitted `(frozen, tokens [m, ...]) -> Guided`, what the policy sees of records.
    encode_fn: jitted `(frozen, samples [m, ..., *sample], seed, i, j) -> x_0`, with the leading
      axes of the samples; of an autoencoder a sample of its posterior, whose noise is a function of
      the three integers.
    kl_fn: jitted `(params, frozen, Sampled, table) -> [m]`, the KL to the reference of each
      trajectory, in nats, whole on every device. ValueError without trajectories.
  """

  mesh: jax.sharding.Mesh
  model: Model
  guidance: Mapping[str, Any]
  pipeline: Pipeline
  policy: policy_lib.Policy
  frozen: Mapping[str, Params]
  sampler: steering.Sampler
  rewards: combine.WeightedRewards | None
  sample: Callable[[Params, Mapping[str, Params], Tokens, Array, Key, StepTable], Sampled]
  sample_fn: Callable[..., Sampled]
  condition_fn: Callable[[Mapping[str, Params], Tokens], guidance_lib.Guided]
  encode_fn: Callable[[Mapping[str, Params], Array, int, int, int], Array]
  kl_fn: Callable[[Params, Mapping[str, Params], Sampled, StepTable], Array]

  @property
  def process(self) -> transitions.Process:
    return self.pipeline.process

  def pipeline_with(self, rewards: combine.WeightedRewards | None) -> Pipeline:
    """`pipeline`, with the rewards too if they run on the device.

    The loss finds their parameters in `frozen["rewards"]`.
    """
    device = None if rewards is None else rewards.device
    return self.pipeline if device is None else self.pipeline.with_reward(device)

  def tokenize(self, records: Sequence[Record]) -> Any:
    """What programs that sample want of records: their tokens, `Asked` where rewards are asked too.

    A ValueError names the field that a record misses.
    """
    tokens = self.model.tokenize(records)
    if self.rewards is None:
      return tokens
    try:
      return Asked(tokens, binding.on_device(self.rewards).encode(records))
    except ValueError as error:
      raise ValueError(f"what the sampler goes by: {error}") from error

  def with_sampler(
    self, sampler: Mapping[str, Any], rewards: combine.WeightedRewards | None = None
  ) -> "System":
    """The same model and policy, sampled otherwise; parameters are shared.

    Args:
      sampler: the section of a config, `{"name": ..., **kwargs}`, see `steering.make`.
      rewards: that it ranks by, all of them on the device.
    """
    made, of_rewards = binding.bind(self.pipeline, sampler, rewards, self.mesh)
    frozen = {name: tree for name, tree in self.frozen.items() if name != "rewards"} | of_rewards
    programs: Any = make_sampling(self.model, made, self.policy, self.mesh)
    return dataclasses.replace(self, frozen=frozen, sampler=made, rewards=rewards, **programs)

  def guided_from(self, record: Record) -> "System":
    """The same model and policy, guided away from what a record says: a negative condition.

    It takes the place of the empty condition; parameters are shared. Raises ValueError for a record
    that misses a field.
    """
    model = self.model._replace(empty=self.model.tokenize([record]))
    programs: Any = {
      **make_sampling(model, self.sampler, self.policy, self.mesh),
      **make_programs(model, self.pipeline, self.policy, self.mesh),
    }
    return dataclasses.replace(self, model=model, **programs)

  def sample_all(
    self,
    params: Params,
    records: Sequence[Record],
    *,
    microbatch: int,
    seed: int,
    part: int = 0,
    kl: bool = False,
    each: Callable[[Array, np.ndarray], None] | None = None,
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples `[M, ...]` of any number of records, and with `kl` the KL to the reference `[M]`.

    The KL costs the network twice over every trajectory, twice what sampling costs; where no step
    has noise, or the sampler keeps no trajectory, it is None, and nothing is computed for it. The
    noise is that of evaluations, and comes from `seed`, `part` and the microbatch's size. The last
    microbatch is padded, so that no second program is compiled. `each` is called with every
    microbatch `[m, ...]` as it lies on the mesh, and the numbers `[m]` of its records, before
    anything waits for it.
    """
    if microbatch < 1 or len(records) < 1:
      raise ValueError(
        f"expected at least one record in microbatches of at least 1, got {len(records)} records "
        f"in microbatches of {microbatch}"
      )
    tokens = self.tokenize(records)
    samples, nats = [], []
    kl = kl and self.sampler.keeps_trajectory and bool(self.process.noisy_steps())
    for j, start in enumerate(range(0, len(records), microbatch)):
      rows = np.minimum(np.arange(start, start + microbatch), len(records) - 1)
      noise = (seed, streams.number("evaluation"), part, j, None, self.pipeline.table)
      sampled = self.sample_fn(params, self.frozen, take(tokens, rows), *noise)
      if each is not None:
        each(sampled.samples, rows)
      samples.append(sharding.gather(sampled.samples))
      if kl:
        nats.append(np.asarray(self.kl_fn(params, self.frozen, sampled, self.pipeline.table)))
    found = np.concatenate(nats)[: len(records)] if kl else None
    return np.concatenate(samples)[: len(records)], found


def take(tokens: Tokens, rows: np.ndarray) -> Tokens:
  """The tokens of some records, `[len(rows), ...]`."""
  return jax.tree.map(lambda leaf: leaf[rows], tokens)


def make_system(
  *,
  seed: int,
  model: Mapping[str, Any],
  lora: Mapping[str, Any],
  process: Mapping[str, Any],
  guidance: Mapping[str, Any],
  sampler: Mapping[str, Any] = CHAIN,
  rewards: combine.WeightedRewards | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> System:
  """Builds the system from the sections of a config that have these names.

  `rewards` are what the sampler ranks by, all of them on the device; the chain needs none. On one
  device, unless there is a `mesh`. On one that is only described no weights are needed.
  """
  shapes_only = mesh is not None and sharding.is_described(mesh)
  opened = checks.call_section(
    {"model": model}, "model", families.open_model, shapes_only=shapes_only
  )
  return from_model(
    opened,
    seed=seed,
    lora=lora,
    process=process,
    guidance=guidance,
    sampler=sampler,
    rewards=rewards,
    mesh=mesh,
  )


def from_model(
  model: Model,
  *,
  seed: int,
  lora: Mapping[str, Any],
  process: Mapping[str, Any],
  guidance: Mapping[str, Any],
  sampler: Mapping[str, Any] = CHAIN,
  rewards: combine.WeightedRewards | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> System:
  """As `make_system`, of a model that is already in memory."""
  mesh = mesh or sharding.one_device()
  guidance = guidance_lib.settled(guidance, model.guidance)
  sections = {"lora": lora, "process": process, "guidance": guidance}
  section = functools.partial(checks.call_section, sections)
  if model.empty is None and guidance_lib.count_branches(**guidance) == 2:
    raise ValueError(
      f"config.guidance.scale: expected 1, because this model has no input without a condition to "
      f"guide away from; got {guidance['scale']}"
    )
  policy = section(
    "lora",
    policy_lib.make_policy,
    denoiser=model.params["denoiser"],
    key=streams.stream(seed, "policy"),
    dtype=model.dtype,
  )
  policy = place_policy(policy, model, mesh)
  steps = section("process", model.make_process)
  guided = section("guidance", guidance_lib.make, denoise_fn=model.denoise)
  without = guidance_lib.told(model.denoise, **guidance)
  pipeline = Pipeline(
    kernel=Kernel(guided, steps.transition),
    conditional=Kernel(without, steps.transition),
    table=steps.table,
    levels=model.levels,
    prediction_type=model.prediction_type,
    latent_shape=model.latent_shape,
    decode=model.decode,
  )
  bound, of_rewards = binding.bind(pipeline, sampler, rewards, mesh)
  frozen = {
    "base": policy.base,
    "reference": policy.reference(),
    **{
      name: sharding.place_params(params, mesh)
      for name, params in model.params.items()
      if name != "denoiser"
    },
    **of_rewards,
  }
  programs = {
    **make_sampling(model, bound, policy, mesh),
    **make_programs(model, pipeline, policy, mesh),
  }
  return System(mesh, model, guidance, pipeline, policy, frozen, bound, rewards, **programs)


def make_sampling(
  model: Model, sampler: steering.Sampler, policy: policy_lib.Policy, mesh: jax.sharding.Mesh
) -> dict[str, Callable[..., Any]]:
  """`sample` and `sample_fn` of a `System`."""
  sample = make_sample(sampler, make_condition(model), policy)

  def sample_fn(params, frozen, tokens, seed, name, i, j, start, table):
    # One key for where the chains start, and one for the noise of their steps.
    key_start, key_steps = jax.random.split(streams.stream(seed, name, i, j))
    count = len(jax.tree.leaves(tokens)[0])
    x_T = jax.random.normal(key_start, (count, *model.latent_shape))
    x_T = x_T if start is None else x_T[start]
    tokens, x_T = sharding.constrain_batch((tokens, x_T), mesh)
    return sample(params, frozen, tokens, x_T, key_steps, table)

  placed = sampled_shardings(mesh, sampler.keeps_trajectory)
  return {"sample": sample, "sample_fn": placement.jit(sample_fn, mesh, out_shardings=placed)}


def make_programs(
  model: Model, pipeline: Pipeline, policy: policy_lib.Policy, mesh: jax.sharding.Mesh
) -> dict[str, Callable[..., Any]]:
  """The other functions of a `System` by name, jitted for the mesh."""
  condition = make_condition(model)

  def encode_fn(frozen, samples, seed, i, j):
    key = streams.stream(seed, "encoding", i, j)
    leading = samples.shape[: samples.ndim - len(model.sample_shape)]
    x_0 = model.encode(frozen, samples.reshape(-1, *model.sample_shape), key)
    return x_0.reshape(*leading, *x_0.shape[1:])

  def kl_fn(params, frozen, sampled, table):
    if sampled.rollout is None:
      raise ValueError("expected a sampler that keeps trajectories, such as chain; this has no KL")
    frozen = policy.ready(params, frozen)
    kl = log_ratios.trajectory_kl(
      pipeline.kernel,
      policy.variables(params, frozen["base"]),
      frozen["reference"],
      table,
      sampled.rollout.x,
      sampled.cond,
    )
    return jnp.sum(kl, axis=0)

  return {
    "condition_fn": placement.jit(condition, mesh, out_shardings=sampled_shardings(mesh).cond),
    "encode_fn": placement.jit(encode_fn, mesh, out_shardings=sharding.batch(mesh)),
    "kl_fn": placement.jit(kl_fn, mesh, out_shardings=sharding.replicated(mesh)),
  }


def from_config(
  config: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None = None,
  rewards: combine.WeightedRewards | None = None,
) -> System:
  """The system of a run's whole config, on one device or on `mesh`.

  A config without a section `sampler` is sampled by the chain. Another sampler ranks by `rewards`,
  or without them by those of the section `reward` if they run on the device.
  """
  sampler = config.get("sampler", CHAIN)
  if rewards is None and sampler != CHAIN and "reward" in config:
    described = mesh is not None and sharding.is_described(mesh)
    found = checks.call_section(config, "reward", combine.make_total, shapes_only=described)
    rewards = None if found.device is None else found
  names = ("model", "lora", "process", "guidance")
  sections = {name: config[name] for name in names}
  return make_system(seed=config["seed"], mesh=mesh, sampler=sampler, rewards=rewards, **sections)


def sampled_shardings(mesh: jax.sharding.Mesh, trajectories: bool = True) -> Any:
  """Where a `Sampled` lies, as a prefix of it: cut along its samples."""
  first: Any = sharding.batch(mesh)
  second: Any = sharding.batch(mesh, axis=1)
  cond = guidance_lib.Guided(first, sharding.replicated(mesh))
  rollout = rollout_lib.Rollout(x=second, log_prob=second) if trajectories else None
  return Sampled(rollout, cond, samples=first, x_0=first, info=first)


def place_policy(
  made: policy_lib.Policy, model: Model, mesh: jax.sharding.Mesh
) -> policy_lib.Policy:
  """The policy with its arrays on the mesh, frozen ones as the model says that they are stored."""
  dtypes = None if model.stored_dtypes is None else model.stored_dtypes(made.base)
  return made._replace(
    params=sharding.place_params(made.params, mesh),
    base=sharding.place_params(made.base, mesh, dtypes),
  )


def make_condition(model: Model) -> Callable[[Mapping[str, Params], Tokens], guidance_lib.Guided]:
  """The pure function from tokens to what the policy sees of them, and of the empty condition."""

  def condition(frozen, tokens):
    uncond = None
    if model.empty is not None:
      # Apart from the others: a batch of one more row is one that no devices share evenly.
      uncond = jax.tree.map(placement.whole, model.condition(frozen, model.empty))
    return guidance_lib.Guided(model.condition(frozen, tokens), uncond)

  return condition


def make_sample(
  sampler: steering.Sampler,
  condition: Callable[[Mapping[str, Params], Tokens], guidance_lib.Guided],
  policy: policy_lib.Policy,
) -> Callable[[Params, Mapping[str, Params], Tokens, Array, Key, StepTable], Sampled]:
  """The pure function from tokens and initial noise to samples, by whatever sampler."""

  def sample(params, frozen, tokens, x_T, key, table):
    tokens, query = tokens if isinstance(tokens, Asked) else (tokens, None)
    cond = condition(frozen, tokens)
    frozen = policy.ready(params, frozen)
    variables = policy.variables(params, frozen["base"])
    inputs = steering.Inputs(cond, x_T, query)
    sampled = sampler.sample(key, variables, frozen, inputs, table)
    if (sampled.rollout is not None) != sampler.keeps_trajectory:
      raise ValueError(
        f'sampler "{sampler.name}": expected Sampled.rollout exactly where the Sampler has '
        f"keeps_trajectory; it has {sampler.keeps_trajectory}"
      )
    return sampled

  return sample
