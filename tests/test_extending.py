"""docs/extending.md: each part of one's own alone in a folder, run by the command beside it."""

import dataclasses
import json
import re
import shlex
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_jobs import ROOT, records
from PIL import Image

from jaxalign import main, rewards, sample, system, train
from jaxalign.cli import command, configs, sections
from jaxalign.diffusion import guidance
from jaxalign.labels import advantages
from jaxalign.models import families
from jaxalign.training import checkpoint, least_work
from jaxalign.training import setup as setup_lib

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.compile(
  r"^## ([^\n]+)\n.*?```python\n(# (\w+)\.py\n.*?)```.*?```bash\n(.*?)```", re.M | re.S
)


class Example(NamedTuple):
  """name: of the module; command: the words of what is to be typed."""

  name: str
  code: str
  command: list[str]


EXAMPLES = {
  title: Example(name, code, shlex.split(command.replace("\\\n", " ")))
  for title, code, name, command in BLOCKS.findall(PAGE)
}
PARTS = {
  "A loss", "A method with data of its own", "An advantage estimator", "A reward on the host",
  "A reward on the device", "A sampler", "A transition", "A guidance", "A model family",
  "A modality",
}  # fmt: skip


@pytest.fixture
def extend(tmp_path, monkeypatch):
  """`extend(title)`: the module of an example, alone on the path."""
  made = []

  def place(title):
    name, code, _ = EXAMPLES[title]
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    made.append(name)

  yield place
  for name in made:
    sys.modules.pop(name, None)


def config_of(title):
  """The config that the command of an example asks for, as its flags make it."""
  given = EXAMPLES[title].command
  assert given[:3] == ["python", "-m", "jaxalign.main"]
  values = command.parse(main.define_flags, *given[3:])
  assert values.workdir.parent.name == "runs"
  config = configs.load(values.config, values[configs.CHANGES].value, optional=sections.OPTIONAL)
  config.samples.every = 0
  return config


@pytest.fixture
def run(extend, tmp_path):
  """`run(title)`: the workdir of the example's finished run."""

  def align(title):
    extend(title)
    train.train(config_of(title), tmp_path / "run")
    assert len(records(tmp_path / "run")) == 2
    return tmp_path / "run"

  return align


def test_the_page_has_an_example_of_every_part():
  assert set(EXAMPLES) == PARTS
  assert len(re.findall("```python", PAGE)) == len(re.findall("```bash", PAGE)) == len(PARTS)
  assert len({example.name for example in EXAMPLES.values()}) == len(PARTS)  # one file each
  (table,) = re.findall(r"\|---.*?\n((?:\|.*\n)+)", PAGE)
  rows = [row.split("|")[-2].strip() for row in table.splitlines()]
  assert rows == ["one"] * len(PARTS)


def test_a_loss(run):
  """At a ratio of 1 its gradient is the policy gradient's: the first update is DDPO's."""
  workdir = run("A loss")
  assert [record["policy/first_ratio_max_error"] for record in records(workdir)] == [0.0, 0.0]
  from my_loss import spo_loss

  advantage = jnp.array([1.0, -2.0, 0.5])
  zero = jnp.zeros(3)
  slope = jax.grad(lambda log_prob: spo_loss(log_prob, zero, advantage, clip_range=0.2).sum())
  np.testing.assert_allclose(slope(zero), -advantage, rtol=1e-6)
  # Least at a ratio of 1 + clip_range or 1 - clip_range, whatever the size of the advantage.
  np.testing.assert_allclose(slope(jnp.log(jnp.array([1.2, 0.8, 1.2]))), zero, atol=1e-6)


def test_a_method_with_data_of_its_own(run):
  workdir = run("A method with data of its own")
  written = records(workdir)
  assert all(record["kept"] > record["reward/mean"] for record in written)
  assert written[0]["reward/kept"] == pytest.approx(written[0]["kept"], abs=1e-5)
  _, state = checkpoint.read_latest(workdir)
  assert set(state["copies"]) == {"old"}
  moved, behind = (tree["params"]["mean"] for tree in (state["params"], state["copies"]["old"]))
  assert np.abs(moved - behind).max() > 0


def test_an_advantage_estimator(run):
  _, state = checkpoint.read_latest(run("An advantage estimator"))
  assert np.count_nonzero(state["memory"]) > 0
  made = advantages.make("my_advantage:running_mean", rate=0.5, limit=10.0)
  scores = advantages.Scores(
    total=np.array([[1.0, 3.0], [5.0, 5.0]], np.float32), named={}, weights={},
    penalty=np.zeros((2, 2), np.float32), record=np.array([2, 0]), group=np.array([1, 0]),
    valid=np.ones((2, 2), bool),
  )  # fmt: skip
  memory, first = made.estimate(made.init(3), scores)
  np.testing.assert_array_equal(first, [1.0, 3.0, 5.0, 5.0])
  np.testing.assert_array_equal(memory, [2.5, 0.0, 1.0])
  np.testing.assert_array_equal(made.estimate(memory, scores)[1], [0.0, 2.0, 2.5, 2.5])


def test_a_reward_on_the_host(run):
  written = records(run("A reward on the host"))
  for record in written:
    total = record["reward/my_reward:near"] + 0.5 * record["reward/gaussian_quadratic"]
    assert record["reward/mean"] == pytest.approx(total, abs=1e-5) and record["reward/std"] > 0


def test_a_reward_on_the_device(run):
  """It is part of a program: pure, and differentiable in the samples."""
  workdir = run("A reward on the device")
  assert all(record["reward/my_device_reward:short"] < 0 for record in records(workdir))
  made = rewards.make_device("my_device_reward:short", weight=0.5)
  corner = jnp.array([[[0.0, 1.0], [2.0, 1.0]]])
  query = made.encode([{"start": [0.0, 0.0]}])
  score = lambda plans: made.score(made.params, plans, query).sum()  # noqa: E731
  value, slope = jax.value_and_grad(score)(corner)
  assert value == pytest.approx(-1.5)
  np.testing.assert_allclose(slope[0, -1], [-0.5, 0.0], atol=1e-6)  # shorter is better


def test_a_sampler(extend, tmp_path, monkeypatch):
  """On a Gaussian the chain without noise is linear: half of the first noise, half of the way."""
  extend("A sampler")
  monkeypatch.chdir(tmp_path)
  given = EXAMPLES["A sampler"].command
  assert given[:3] == ["python", "-m", "jaxalign.sample"]

  def points(*changes):
    sample.main(command.parse(sample.define_flags, *given[3:], *changes))
    return np.load("samples/points.npy")

  half, whole, none = points(), *(
    points(f'--sampler_args={{"temperature": {temperature}}}') for temperature in (1.0, 0.0)
  )
  assert half.shape == (2, 2) and np.abs(whole - none).max() > 0.1
  np.testing.assert_allclose(half - none, 0.5 * (whole - none), atol=1e-5)


def test_a_transition(run):
  """It has noise in every step but the last, which ends at the data; and ratios and a KL."""
  workdir = run("A transition")
  for record in records(workdir):
    assert record["policy/first_ratio_max_error"] == 0.0 and record["policy/log_prob_gap"] < 1e-4
  report = json.loads((workdir / "evaluation.json").read_text())
  assert report["kl_to_ref"] > 0 and report["kl_steps"] == [3, 4]


def test_a_guidance(run):
  """Inside the interval it is classifier-free guidance, outside it there is none."""
  run("A guidance")
  network = lambda params, x_t, t, cond: x_t * cond["text"] + t[:, None]  # noqa: E731
  cond = guidance.Guided({"text": jnp.array([[1.0], [2.0], [3.0]])}, {"text": jnp.array([[0.5]])})
  given = ({}, jnp.array([[1.0, -1.0], [0.5, 2.0], [3.0, 1.0]]), jnp.array([100.0, 500.0, 900.0]))
  section = config_of("A guidance").guidance.to_dict()
  found = guidance.make(network, **section)(*given, cond)
  guided = guidance.make(network, scale=section["scale"])(*given, cond)
  plain = guidance.make(network, scale=1.0)(*given, cond)
  assert np.abs(guided - plain).min() > 0.1
  np.testing.assert_allclose(found, jnp.stack([plain[0], guided[1], plain[2]]), rtol=1e-6)


def test_how_often_a_guidance_of_ones_own_asks_the_network_is_not_known(extend):
  extend("A guidance")
  sections = config_of("A guidance").to_dict()
  setup = setup_lib.assemble(sections)
  tokens = setup.system.tokenize([{"start": [0.0, 0.0], "goal": [0.9, 0.1]}])
  least = least_work.Programs(setup.system, sections, tokens)
  assert least.rollout(2) is None and least.update(2) is None
  guided = dataclasses.replace(setup.system, guidance={"scale": 3.0})
  known = least_work.Programs(guided, sections, tokens)
  assert known.rollout(2) > 0 and known.update(2) > 0


def test_a_model_family(run):
  """The denoiser is the exact one: without a drift, points lie around the starts of records."""
  run("A model family")
  path = {"path": "my_model:open_model", "drift": (0.25, -0.5)}
  process = {"transition": "ddim", "num_steps": 200, "eta": 0.0}
  sys = system.make_system(
    seed=0, model=path, lora=system.NO_LORA, process=process, guidance={"scale": 1.0}
  )
  points, _ = sys.sample_all(
    sys.policy.params, [{"start": [0.5, 0.5]}] * 512, microbatch=512, seed=0
  )
  np.testing.assert_allclose(points.mean(axis=0), [0.75, 0.0], atol=0.02)
  np.testing.assert_allclose(points.std(axis=0), 0.1, rtol=0.15)
  with pytest.raises(ValueError, match='expected a "start" of two numbers'):
    sys.tokenize([{"number": 3}])


def test_a_modality(run):
  workdir = run("A modality")
  assert "throughput/signals_per_s" in (workdir / "metrics.jsonl").read_text()
  grey = np.asarray(Image.open(workdir / "before_after.png").convert("L"))
  assert grey.std() > 5 and grey.shape[0] == 32  # a row before and a row after, 16 pixels high
  (path,) = families.open_model("my_modality:open_model").modality.write(np.ones((1, 2)), workdir)
  np.testing.assert_array_equal(np.loadtxt(path), [1.0, 1.0])
