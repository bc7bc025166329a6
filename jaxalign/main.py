"""The main command.

  python -m jaxalign.main --config=configs/ddpo.py --workdir=runs/ddpo

On several machines each process runs it, with `--distributed` where SLURM, Open MPI or Kubernetes
say who is who, or with the three flags that do; see docs/devices.md.
"""

import functools
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from jaxalign import train
from jaxalign.aot import topology
from jaxalign.cli import command, paths
from jaxalign.distributed import hosts
from jaxalign.recipes import shapes_model, shapes_reward
from jaxalign.training import described_dry_run, reward_model
from jaxalign.training import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
_WORKDIR = paths.define("workdir", None, "Folder of the run; starting again continues it.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Compile, print batch sizes, memory and speed, and stop."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "With --dry_run: compile for devices that are not here, such as 8xh100."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one process of several.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT at which process 0 of several can be reached."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

# What makes something else than an aligned model; these have no dry run.
FITS = {
  "pretrain": shapes_model.pretrain,
  "reward_model": functools.partial(reward_model.fit, warm_start=shapes_reward.warm_start),
}
FLOWS = ("align", *FITS)


def main(argv):
  del argv
  config = _CONFIG.value
  if config is None or (_WORKDIR.value is None and not _DRY_RUN.value):
    raise flags.Error("expected --config=FILE and --workdir=FOLDER, e.g. --config=configs/ddpo.py")
  if _TOPOLOGY.value is not None and not _DRY_RUN.value:
    raise flags.Error("--topology: expected it with --dry_run, as nothing can run on such devices")
  workdir = _WORKDIR.value or pathlib.Path(".")
  paths.make_absolute(config)
  job = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _DISTRIBUTED.value or job != (None, None, None):
    hosts.join(*job)
  if config.flow not in FLOWS:
    raise ValueError(f"config.flow: expected one of {', '.join(FLOWS)}; got {config.flow!r}")
  if config.flow == "align" and _TOPOLOGY.value is not None:
    jax.config.update("jax_platforms", "cpu")  # no device of this machine takes part
    described_dry_run.rehearse(config, workdir, topology.find_devices(_TOPOLOGY.value))
  elif config.flow == "align":
    train.train(config, workdir, dry_run=_DRY_RUN.value)
  elif _DRY_RUN.value:
    raise flags.Error(
      f"--dry_run: expected a config that aligns a model, with flow 'align'; got {config.flow!r}"
    )
  elif jax.process_count() > 1:
    raise ValueError(f"expected one process, because flow {config.flow!r} uses one; found several")
  else:
    with workdir_lib.prepared(workdir, config):
      FITS[config.flow](config, workdir)


if __name__ == "__main__":
  command.make_configs_importable()
  command.run(main)
