"""The main command.

  python -m jaxalign.main --config=ddpo --workdir=runs/ddpo

On several machines each process runs it, with `--distributed` where SLURM, Open MPI or Kubernetes
say who is who, or with the three flags that do; see docs/devices.md.
"""

import functools
import pathlib

import jax
from absl import flags

from jaxalign import checks, train
from jaxalign.aot import topology
from jaxalign.cli import command, configs, paths, sections
from jaxalign.distributed import hosts
from jaxalign.recipes import sections as recipe_sections
from jaxalign.recipes import shapes_model, shapes_reward
from jaxalign.training import described_dry_run, reward_model
from jaxalign.training import workdir as workdir_lib

# What makes something else than an aligned model; these have no dry run.
FITS = {
  "pretrain": shapes_model.pretrain,
  "reward_model": functools.partial(reward_model.fit, warm_start=shapes_reward.warm_start),
}
FLOWS = ("align", *FITS)


def define_flags(values: flags.FlagValues) -> None:
  configs.define(values)
  paths.define(
    "workdir", None, "Folder of the run; starting again continues it.", flag_values=values
  )
  define_bool = functools.partial(flags.DEFINE_bool, flag_values=values)
  define_string = functools.partial(flags.DEFINE_string, flag_values=values)
  define_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  define_bool("dry_run", False, "Compile, print batch sizes, memory and speed, and stop.")
  define_string(
    "topology", None, "With --dry_run: compile for devices that are not here, such as 8xh100."
  )
  define_bool("distributed", False, "This is one process of several.")
  help = "HOST:PORT at which process 0 of several can be reached."
  define_string("coordinator_address", None, help)
  define_integer("num_processes", None, "How many processes there are.")
  define_integer("process_id", None, "Which of them this is, from 0.")


def main(values: flags.FlagValues) -> None:
  if values.config is None:
    raise flags.Error("expected --config=NAME and --workdir=FOLDER, e.g. --config=ddpo")
  config = configs.load(values.config, values[configs.CHANGES].value, optional=sections.OPTIONAL)
  if values.workdir is None and not values.dry_run:
    raise flags.Error("expected --workdir=FOLDER, which the run is written to")
  if values.topology is not None and not values.dry_run:
    raise flags.Error("--topology: expected it with --dry_run, as nothing can run on such devices")
  workdir = values.workdir or pathlib.Path(".")
  paths.make_absolute(config)
  flow = config.get("flow")
  checks.check_choice("config.flow", flow, FLOWS)
  job = (values.coordinator_address, values.num_processes, values.process_id)
  if values.distributed or job != (None, None, None):
    hosts.join(*job)
  if flow == "align" and values.topology is not None:
    jax.config.update("jax_platforms", "cpu")  # no device of this machine takes part
    sections.check(config.to_dict())
    described_dry_run.rehearse(config, workdir, topology.find_devices(values.topology))
  elif flow == "align":
    train.train(config, workdir, dry_run=values.dry_run)
  elif values.dry_run:
    raise flags.Error(
      f"--dry_run: expected a config that aligns a model, with flow 'align'; got {flow!r}"
    )
  elif jax.process_count() > 1:
    raise ValueError(f"expected one process, because flow {flow!r} uses one; found several")
  else:
    recipe_sections.check(config.to_dict())
    with workdir_lib.prepared(workdir, config):
      FITS[flow](config, workdir)


if __name__ == "__main__":
  command.run(main, define_flags)
