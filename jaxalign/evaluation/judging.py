"""What evaluations score with: rewards whose parameters lie on the mesh once for all of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import system
from jaxalign.distributed import hosts
from jaxalign.rewards import scoring
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.retry import NEVER, Retry
from jaxalign.types import Record


class Judge:
  """The rewards of evaluations: those with a form on the device on the mesh, the others after it.

  placed: `(mesh) -> WeightedRewards`, with their parameters on it.
  on_mesh: `(system) -> OnMesh`, the program that scores samples of a system where they lie.
  """

  def __init__(self, rewards: WeightedRewards, retry: Retry = NEVER):
    self.rewards, self._retry = rewards, retry
    self.placed = functools.cache(self._placed)
    self.on_mesh = functools.cache(self._on_mesh)

  def _placed(self, mesh: jax.sharding.Mesh) -> WeightedRewards:
    return scoring.placed(self.rewards, mesh)

  def _on_mesh(self, sys: system.System) -> scoring.OnMesh:
    return scoring.OnMesh(self.placed(sys.mesh), sys.model.modality, sys.mesh)

  def begin(self, sys: system.System, query: Any) -> "Judging":
    """For one evaluation of samples of a system; `query` is `encode` of its records."""
    return Judging(self.rewards, self._retry, self.on_mesh(sys), query)


class Judging:
  """One evaluation: `add` every microbatch as it is sampled, `finish` with all samples."""

  def __init__(
    self, rewards: WeightedRewards, retry: Retry, on_mesh: scoring.OnMesh, query: dict[str, Any]
  ):
    self._rewards, self._retry, self._on_mesh, self._query = rewards, retry, on_mesh, query
    self._pending: list[Any] = []

  def add(self, samples: jax.Array, rows: np.ndarray) -> None:
    """Begins to score samples `[m, ...]` of the records `rows` `[m]`, and waits for nothing."""
    self._pending.append(self._on_mesh.score(samples, self._query, rows))

  def finish(
    self, samples: np.ndarray, records: Sequence[Record], microbatch: int
  ) -> dict[str, np.ndarray]:
    """Rewards `{name: [N]}` of all samples, which have been checked; NaN where one abstained."""
    found = {part.name: np.zeros(len(samples), np.float32) for part in self._rewards.rewards}
    starts = range(0, len(samples), microbatch)
    for start, scored in zip(starts, self._pending, strict=True):
      piece = slice(start, start + microbatch)
      for name, values in self._on_mesh.fetch(scored, samples[piece]).items():
        found[name][piece] = values
    if self._rewards.host_parts:
      # In pieces, because a reward network that fits in training must fit here.
      on_host = {part.name: np.zeros(len(samples), np.float32) for part in self._rewards.host_parts}
      for start in hosts.share(starts):
        piece = slice(start, start + microbatch)
        scored = self._rewards.on_host(samples[piece], records[piece], self._retry)
        for name, values in scored.items():
          on_host[name][piece] = values
      found |= {name: hosts.sum_of(values) for name, values in on_host.items()}
    return found
