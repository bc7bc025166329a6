"""A run's rewards at work: on its mesh those that have a form there, in the pool the others.

Samples that are scored on the mesh stay where they were sampled, and neither program waits for the
other's host. They come to the host only for a reward that has no other form.
"""

from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.checks.own_code import FAILURES
from jaxalign.data.records import RecordSet
from jaxalign.distributed import hosts, placement, sharding
from jaxalign.modalities.modality import Modality, SampleError
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import DeviceReward, RewardError, check_rewards, failed
from jaxalign.rewards.pool import RewardPool, check_samples
from jaxalign.types import Params


def placed(total: WeightedRewards, mesh: jax.sharding.Mesh) -> WeightedRewards:
  """The rewards with their parameters on the mesh; those that are there already stay the same."""

  def place(params: Params) -> Params:
    arrays = jax.tree.map(lambda x: x if hasattr(x, "shape") else np.asarray(x), params)
    return sharding.place_params(arrays, mesh)

  return total.map_params(place)


class OnMesh:
  """The rewards that have a form on the device, as one program on the mesh of the samples.

  Their parameters are an argument of it, and lie there already (`placed`).

  score_fn: jitted `(params, samples [m, ...], query) -> ({name: [m]}, fit [m] | None)`.
  """

  def __init__(self, total: WeightedRewards, modality: Modality, mesh: jax.sharding.Mesh):
    self.rewards, self.modality, self.mesh = total.device_parts, modality, mesh
    self._params = total.params
    self.score_fn = _jit_score(self.rewards, modality, mesh)

  def score(self, samples: jax.Array, query: dict[str, Any], rows: np.ndarray) -> Any:
    """What `fetch` takes, of samples `[m, ...]` that are of the rows `[m]` of the query.

    It does not wait for the samples. None without rewards.
    """
    if not self.rewards:
      return None
    asked = jax.tree.map(lambda leaf: leaf[rows], query)
    return self.score_fn(self._params, samples, asked)

  def fetch(self, scored: Any, samples: jax.Array | np.ndarray) -> dict[str, np.ndarray]:
    """float32 `{name: [m]}`; RewardError, with its sample, where one must not reach the update.

    `samples` are those that were scored, on the mesh or on the host, or the first of them: others
    fill up a microbatch. All processes must call it, and all of them raise.
    """
    if scored is None:
      return {}
    size = len(samples)
    values, fit = jax.tree.map(lambda leaf: leaf[:size], jax.device_get(scored))
    if fit is not None and not fit.all():
      self._refuse(samples, int(fit.argmin()))
    try:
      return {name: check_rewards(name, value, size) for name, value in values.items()}
    except RewardError as error:
      if error.index is not None:
        error.sample = _on_first(_gathered(samples)[error.index])
      raise

  def _refuse(self, samples: jax.Array | np.ndarray, index: int) -> None:
    """Says what is wrong with samples of which the one at `index` is unfit."""
    held = np.asarray(_gathered(samples), np.float32)
    try:
      check_samples(self.modality.check, held)
    except RewardError as error:
      error.sample = None if error.sample is None else _on_first(error.sample)
      raise
    error = RewardError(f"{self.modality.unit}: the one at index {index} is not fit", index=index)
    error.sample = _on_first(held[index])
    raise error


class Pending(NamedTuple):
  """A microbatch that is being scored.

  samples: `[m, ...]`, on the mesh.
  on_mesh: what `OnMesh.fetch` takes.
  rows: `[b]`, those that this process holds; None where nothing is scored on the host.
  on_host: of the rewards of these rows; or None.
  """

  samples: jax.Array
  on_mesh: Any
  rows: np.ndarray | None = None
  on_host: futures.Future | None = None


class Scorer:
  """`submit` each microbatch as it is sampled, then `gather` the iteration; a context manager.

  Neither waits for samples before all microbatches are under way. Of several processes each scores
  on the host what it holds, and every one learns all rewards.
  """

  def __init__(
    self,
    total: WeightedRewards,
    on_mesh: OnMesh,  # of the same rewards
    records: RecordSet,
    query: dict[str, Any],  # `WeightedRewards.encode` of all records
    *,
    num_threads: int,
    num_retries: int = 0,
    retry_seconds: float = 1.0,
    max_abstained: float = 0.0,
  ):
    if not 0.0 <= max_abstained <= 1.0:
      raise ValueError(
        f"config.reward_pool.max_abstained: expected a share from 0 to 1, got {max_abstained!r}"
      )
    self._total, self._on_mesh, self._records, self._query = total, on_mesh, records, query
    self._max_abstained = max_abstained
    # Without `fit` no program knows which samples must not be scored.
    self._needs_host = bool(total.host_parts) or on_mesh.modality.fit is None
    check = on_mesh.modality.check
    self._pool = RewardPool(total, check, num_threads, num_retries, retry_seconds)

  def submit(self, samples: jax.Array, ids: np.ndarray) -> Pending:
    """Begins to score samples `[m, ...]` of the records `ids` `[m]`."""
    scored = self._on_mesh.score(samples, self._query, ids)
    if not self._needs_host:
      return Pending(samples, scored)
    rows, held = sharding.held_rows(samples)
    future = self._pool.submit(held, self._records[ids[rows]])
    return Pending(samples, scored, rows, future)

  def gather(self, pending: Sequence[Pending]) -> dict[str, np.ndarray]:
    """Raw rewards `{name: [B]}` over all microbatches, NaN where a reward abstained.

    Raises RewardError for samples or rewards that must not reach the update, and for more
    abstentions than `max_abstained`.
    """
    parts = [self._on_mesh.fetch(one.on_mesh, one.samples) for one in pending]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if self._needs_host:
      found |= self._of_all_hosts(pending)
    named = {reward.name: found[reward.name] for reward in self._total.rewards}
    check_abstained(named, self._max_abstained)
    return named

  def _of_all_hosts(self, pending: Sequence[Pending]) -> dict[str, np.ndarray]:
    """`{name: [B]}` of the rewards on the host, as groups and statistics go over hosts."""
    named = self._pool.gather([one.on_host for one in pending if one.on_host is not None])
    if not named:  # the pool has only looked at the samples
      return {}
    held = np.stack(list(named.values())).reshape(len(named), len(pending), -1)
    rows, size = pending[0].rows, len(pending[0].samples)
    whole = sharding.exchange(held, rows, size, self._on_mesh.mesh)
    return dict(zip(named, whole.reshape(len(named), -1), strict=True))

  def close(self) -> None:
    """Ends the threads."""
    self._pool.close()

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def abstained(named: dict[str, np.ndarray]) -> np.ndarray:
  """bool `[B]`: the samples on which some reward has no verdict, whatever its weight."""
  return np.isnan(list(named.values())).any(axis=0)


def check_abstained(named: dict[str, np.ndarray], limit: float) -> None:
  """Raises RewardError if more than the share `limit` of the samples are without a verdict."""
  without = abstained(named)
  if without.mean() <= limit:
    return
  counts = {name: int(np.isnan(values).sum()) for name, values in named.items()}
  said = ", ".join(f'"{name}" on {count}' for name, count in counts.items() if count)
  raise RewardError(
    f"reward: no verdict of {said} of {len(without)} samples; expected at most "
    f"{limit:.3g} of them, config.reward_pool.max_abstained, found {without.mean():.3g}\n"
    "see why it abstains, or raise that share to train on the others"
  )


def _jit_score(
  rewards: Sequence[DeviceReward], modality: Modality, mesh: jax.sharding.Mesh
) -> Any:
  """Jitted `(params, samples, query) -> ({name: [m]}, fit [m] | None)`, whole on every device."""

  def score(params, samples, query):
    try:
      fit = None if modality.fit is None else modality.fit(samples)
    except SampleError as error:
      raise RewardError(str(error)) from error
    # A few numbers a sample, which are needed on every host.
    asked = sharding.constrain_batch(query, mesh)
    values = {
      reward.name: _value(reward, params[reward.name], samples, asked[reward.name])
      for reward in rewards
    }
    return values, fit

  return placement.jit(score, mesh, out_shardings=sharding.replicated(mesh))


def _value(reward: DeviceReward, params: Params, samples: jax.Array, query: Any) -> Any:
  try:
    found = reward.value(params, samples.astype(jnp.float32), query)
  except FAILURES as error:  # the user's code may raise anything as it is traced
    raise RewardError(failed(reward.name, error)) from error
  if (shape := jnp.shape(found)) != samples.shape[:1]:
    raise RewardError(
      f'reward "{reward.name}": expected shape {samples.shape[:1]}, one number per sample, got '
      f"{shape}"
    )
  return found


def _gathered(samples: jax.Array | np.ndarray) -> np.ndarray:
  return samples if isinstance(samples, np.ndarray) else sharding.gather(samples)


def _on_first(sample: np.ndarray) -> np.ndarray | None:
  """For one process to save, as all of them raise."""
  return np.asarray(sample, np.float32) if hosts.is_first() else None
