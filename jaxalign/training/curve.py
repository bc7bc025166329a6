"""The curve of a run: what was trained on, and what was evaluated, over its iterations."""

import os
import pathlib
from collections.abc import Mapping, Sequence


def save_curve(records: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
  """Plots what was trained on, and all that was evaluated on validation records, over iterations.

  Each has a panel of its own: their scales have nothing in common, and a proxy that rises while
  another reward falls is seen at once. A method without rewards shows its loss in their place.
  """
  path = pathlib.Path(path)
  import matplotlib.figure

  known = {name for record in records for name in record}
  trained = "reward/mean" if "reward/mean" in known else "loss/total"
  names = [trained, *sorted(name for name in known if name.startswith("eval/"))]
  columns = min(3, len(names))
  rows = -(-len(names) // columns)
  figure = matplotlib.figure.Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False).flatten()
  for name, axes in zip(names, panels, strict=False):
    axes.plot(*_series(records, name), linewidth=1.0, marker=None if name == trained else "o")
    axes.set_title(name.replace("eval/", "validation "), fontsize="medium")
    axes.grid(alpha=0.3)
  for axes in panels[len(names) :]:
    axes.set_axis_off()
  figure.supxlabel("iteration")
  figure.savefig(path, dpi=120)


def _series(records: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
  found = [record for record in records if name in record]
  return [record["step"] + 1 for record in found], [record[name] for record in found]
