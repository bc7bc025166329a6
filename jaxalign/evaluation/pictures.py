"""The pictures of a run: the same records and the same noise every time."""

import dataclasses
import os
import pathlib

import numpy as np

from jaxalign import system
from jaxalign.distributed import hosts
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.training import metrics
from jaxalign.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Samples:
  """Writes samples/step_NNNNNN.png.

  Attributes:
    workdir: of the run.
    evaluation: whose records they are.
    writer: gets them too.
    every: iterations between pictures; 0 draws the last one only.
    num_samples: in each picture.
  """

  workdir: str | os.PathLike
  evaluation: evaluation_lib.Evaluation
  writer: metrics.Writer
  every: int
  num_samples: int

  def save(self, step: int, sys: system.System, state: TrainState) -> None:
    """Draws the picture of `step`. The first one is scored too.

    So an evaluation whose rewards do not fit the samples fails before the training, not after it.
    """
    draw = self.evaluation.scored if step == 0 else self.evaluation.sample
    records, samples, *_ = draw(sys, state.sampling_params, num_samples=self.num_samples)
    if not hosts.is_first():
      return
    captions = [sys.model.describe(record) for record in records]
    picture = sys.model.modality.picture(list(samples), captions, 8)
    path = pathlib.Path(self.workdir) / "samples" / f"step_{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    self.writer.picture(step, "samples", np.asarray(picture))
