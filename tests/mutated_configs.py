"""Seeded random mistakes in configs and in flags, and what a command makes of each."""

import pathlib
import random

from ml_collections import config_dict

from jaxalign import main, train
from jaxalign.cli import command, configs, overrides, paths, sections

# Of small models that are opened in no time, learning from samples by step and by sample.
BASES = (
  *("ddpo_gaussian:quicktest", "rwr_gaussian:quicktest", "online_dpo_gaussian:quicktest"),
  *("ddpo_planner:quicktest", "mix_grpo_planner:quicktest", "nft_planner:quicktest"),
)
VALUES = (
  *(0, 1, -1, 7, 2**31, 2**63, 10**30, -(10**30)),
  *(0.0, 0.5, -0.5, 1.5, 1e308, 1e-320, float("inf"), -float("inf"), float("nan")),
  *("", "abc", "None", "a\nb\nc\nd\ne", "\N{SNOWMAN}\x00\u202e", "x" * 5000, "ddpo", "1"),
  *(True, False, None, (), (1,), (32, 48), ("a", "b"), [1, 2], ("planner",), ((1, (2, (3,))),)),
  *({}, {"name": "ddpo"}, {"a": {"b": {"c": 1}}}, {"scale": "abc"}, {"name": 3}, 1j, b"bytes"),
)
WORDS = ("", "x", "name", "nmae", "path", "kwargs", "every", "seed", "a b", "lambda", "scale[0]")


def fields(config):
  """Every field and section, by its dotted key."""
  return overrides.flat(config)


def mutated_config(rng, config):
  """The config with a field dropped, renamed, moved, or given another value."""
  config = config_dict.ConfigDict(config.to_dict())
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    *parents, name = rng.choice(fields(config)).split(".")
    section = config
    for parent in parents:
      section = section[parent]
    kind = rng.choice(("drop", "rename", "value", "value", "value", "add"))
    value = section[name]
    with section.ignore_type():
      if kind in ("drop", "rename"):
        del section[name]
      if kind == "rename":
        section[mistyped(rng, name)] = value
      elif kind == "value":
        section[name] = rng.choice(VALUES)
      elif kind == "add":
        section[rng.choice(WORDS).replace(".", "") or "x"] = rng.choice(VALUES)
  return config


def mistyped(rng, name):
  """The name with a letter less, more, or another."""
  at = rng.randrange(len(name))
  return name[:at] + rng.choice(("", "x", "_", name[at] * 2)) + name[at + 1 :] or "x"


def flag(rng, config):
  """--config.KEY=VALUE as someone in a hurry types it."""
  key = rng.choice(fields(config))
  if rng.random() < 0.3:
    key = mistyped(rng, key)
  elif rng.random() < 0.2:
    key += f".{rng.choice(WORDS)}"
  value = rng.choice(VALUES)
  text = repr(value) if rng.random() < 0.5 and not isinstance(value, str) else str(value)
  form = rng.choice((*["--config.{}={}"] * 4, "--config.{}", "--noconfig.{}"))
  return form.format(key, text)


def outcome(function):
  """What a user sees: "" or the message; whatever else is raised comes out."""
  try:
    function()
  except (Exception, SystemExit) as error:
    message = command.explain(error)
    if message is None:
      raise
    assert 1 <= len(message.splitlines()) <= 3 and 10 < len(message) <= 900, message
    assert "Traceback" not in message, message
    return message
  return ""


def prepare(config, workdir):
  """All that a run does with its config before a program is compiled."""
  paths.make_absolute(config)
  with train.make_parts(config.to_dict(), pathlib.Path(workdir)).feed:
    pass


def try_one(seed, bases, workdir):
  """What a user sees of the mistakes of a seed: in flags if it is odd, in the config if even."""
  rng = random.Random(seed)
  name = rng.choice(BASES)
  if seed % 2 == 0:
    config = mutated_config(rng, bases[name])
    return outcome(lambda: prepare(config, workdir))
  given = [flag(rng, bases[name]) for _ in range(rng.choice((1, 1, 2)))]

  def run():
    values = command.parse(main.define_flags, f"--config={name}", *given)
    changes = values[configs.CHANGES].value
    prepare(configs.load(values.config, changes, optional=sections.OPTIONAL), workdir)

  return outcome(run)
