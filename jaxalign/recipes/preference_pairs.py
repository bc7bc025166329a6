"""Pairs of samples of an embedded model, compared by one who knows what they are worth.

What recipes of preferences share. Writes `pairs.parquet`, in the format of `preference_files` and
with the true scores as an extra column `judge`, and `about.json`. Both are a function of the
settings alone; the noise of the samples depends on the seed and the microbatch.
"""

import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import flags

from jaxalign import checks, files, streams, system
from jaxalign.cli import command, paths
from jaxalign.data import records as records_lib
from jaxalign.data.readers import arrow
from jaxalign.types import Record


class World(NamedTuple):
  """Which model samples, and what is made of its samples.

  model: its name, and that of the world whose sets of records it is asked with.
  columns: of the record and of the samples, in the file.
  asked: `(record) -> ` what is written of a record.
  stored: `(samples [2, ...]) -> samples` as they are stored, which the judge sees too.
  encode: `(sample) -> bytes` of a file of one.
  judge: `(pair [2, ...] as stored, record) -> [2]`, what each is worth.
  """

  model: str
  columns: tuple[str, str]
  asked: Callable[[Record], Any]
  stored: Callable[[np.ndarray], np.ndarray]
  encode: Callable[[np.ndarray], bytes]
  judge: Callable[[np.ndarray, Record], np.ndarray]


def generate(
  world: World,
  *,
  output: str | os.PathLike,
  settings: Mapping[str, Any],
  process: Mapping[str, Any],
) -> dict[str, Any]:
  """Samples, judges, labels and writes pairs; returns what about.json says.

  The label is one draw of `choice_probabilities` of the judge's scores: 1 the first is better, 0
  the second, 0.5 a tie. `accuracy_ceiling` is the share of choices that one who knows the scores
  would get right, ties left out.

  Args:
    world: see there.
    output: a folder; made if needed.
    settings: num_pairs, seed, temperature, tie_margin, guidance_scale, microbatch, split, and
      others that about.json is to say.
    process: as in a config.
  """
  num_pairs, seed, microbatch = (settings[name] for name in ("num_pairs", "seed", "microbatch"))
  temperature, tie_margin = settings["temperature"], settings["tie_margin"]
  if num_pairs < 1 or microbatch < 1 or not 0 < temperature < np.inf or not tie_margin >= 0:
    raise ValueError(
      "expected num_pairs and microbatch of at least 1, a temperature above 0 and a tie_margin of "
      f"at least 0, got {num_pairs}, {microbatch}, {temperature} and {tie_margin}"
    )
  checks.check_seed("seed", seed)
  # Both can fail, and had better do so before an hour of sampling.
  arrow.import_pyarrow()
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)

  of_split = records_lib.load(f"{world.model}/{settings['split']}")
  records = of_split[of_split.draw(streams.generator(seed, "preference prompts"), num_pairs)]
  sections = {"process": process, "guidance": {"scale": settings["guidance_scale"]}}
  pairs = _sample(world, records, seed, microbatch, sections)
  samples, scores = [], np.zeros((num_pairs, 2))
  # They come in bursts of a microbatch, so time left is told from the mean speed.
  progress = tqdm.tqdm(pairs, "sampling pairs", num_pairs, unit="pair", smoothing=0)
  for row, pair in enumerate(progress):
    samples.append([world.encode(sample) for sample in pair])
    scores[row] = world.judge(pair, records[row])
  first, second = choice_probabilities(scores, temperature, tie_margin)
  chosen = streams.generator(seed, "preference labels").random(num_pairs)
  label_0 = np.where(chosen < first, 1.0, np.where(chosen >= 1.0 - second, 0.0, 0.5))

  asked = [world.asked(record) for record in records]
  columns = dict(zip(world.columns, (asked, samples), strict=True))
  _write(folder / "pairs.parquet", **columns, label_0=label_0, judge=scores)
  about = {
    "model": world.model,
    **settings,
    "accuracy_ceiling": float(np.maximum(first, second).sum() / (first + second).sum()),
    "ties": float((label_0 == 0.5).mean()),
    "equal_scores": float((scores[:, 0] == scores[:, 1]).mean()),
  }
  files.write_json(folder / "about.json", about)
  return about


def choice_probabilities(
  scores: np.ndarray, temperature: float, tie_margin: float
) -> tuple[np.ndarray, np.ndarray]:
  """P(first chosen) and P(second chosen), `[N]` each, of scores `[N, 2]`; the rest is a tie.

    P(first) = sigmoid((s_0 - s_1) / temperature - tie_margin)

  Bradley & Terry 1952 at a margin of 0; else with the ties of Rao & Kupper 1967, whose threshold
  is exp(tie_margin).
  """
  d = (scores[:, 0] - scores[:, 1]) / temperature
  # As a tanh, which no temperature makes overflow.
  first, second = (0.5 + 0.5 * np.tanh(0.5 * (x - tie_margin)) for x in (d, -d))
  return first, second


def _sample(
  world: World,
  records: Sequence[Record],
  seed: int,
  microbatch: int,
  sections: Mapping[str, Any],
) -> Iterator[np.ndarray]:
  """Two samples of each record, `[2, ...]` as they are stored."""
  name = streams.number("preference images")
  sys = system.make_system(seed=0, model={"path": world.model}, lora=system.NO_LORA, **sections)
  for j, start in enumerate(range(0, len(records), microbatch)):
    part = records[start : start + microbatch]
    # The last microbatch is filled up, so that no second program is compiled.
    tokens = sys.model.tokenize([*part, *[part[-1]] * (microbatch - len(part))])
    first, second = (
      np.asarray(
        sys.sample_fn(
          sys.policy.params, sys.frozen, tokens, seed, name, i, j, None, sys.pipeline.table
        ).samples
      )
      for i in range(2)
    )
    yield from world.stored(np.stack([first, second], axis=1)[: len(part)])


def _write(file: pathlib.Path, **columns: Iterable) -> None:
  pyarrow = arrow.import_pyarrow()
  table = pyarrow.table({name: list(values) for name, values in columns.items()})
  with files.replacing(file) as temporary:
    pyarrow.parquet.write_table(table, temporary)


def generate_by_flags(
  generate_fn: Callable[..., dict[str, Any]],
  splits: Sequence[str],
  *,
  temperature: float,
  num_steps: int,
  microbatch: int,
  eta: float | None,
) -> None:
  """The command of a recipe: generates what its flags say.

  The numbers are defaults; without an `eta` there is no such flag.
  """
  def define_flags(values):
    define_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    define_float = functools.partial(flags.DEFINE_float, flag_values=values)
    help = "Folder to write to; made if needed."
    paths.define("output", None, help, required=True, flag_values=values)
    define_integer("num_pairs", 4096, "Pairs of samples; records are used several times.")
    define_integer("seed", 0, "Of records, noise and labels.")
    define_float("temperature", temperature, "Of the labels; near 0 the better always wins.")
    define_float("tie_margin", 2.0, "How readily close pairs are ties; 0 is never.")
    define_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none.")
    define_integer("num_steps", num_steps, "Denoising steps.")
    define_integer("microbatch", microbatch, "Samples of each of a pair sampled at once.")
    flags.DEFINE_enum("split", "train", splits, "Of the world's records.", flag_values=values)
    if eta is not None:
      define_float("eta", eta, "DDIM's noise, 0 to 1.")

  def main(values):
    settings = inspect.signature(generate_fn).parameters
    about = generate_fn(**{name: values[name].value for name in settings})
    for name, value in about.items():
      print(f"{name:20}{value}")

  command.run(main, define_flags)
