"""Shared by all tests: a compilation cache, so that no program is compiled twice."""

import gc
import importlib
import itertools
import json
import os
import pathlib

if "PYTEST_XDIST_WORKER" in os.environ:
  os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy is imported

import jax
import numpy as np
import pytest
import shipped
from PIL import Image

import jaxalign.cli.command
from jaxalign.models.families import flow
from jaxalign.models.families.stable_diffusion_networks import Networks

# Traces make objects by the million, which to look through often takes a sixth of their time.
gc.set_threshold(200_000, 20, 20)
# Read when JAX is first used.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {shipped.QUICKLY}"
if "PYTEST_XDIST_WORKER" in os.environ:
  # Workers that each use all cores wait for each other most of the time.
  os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
# What every command does, for what tests run in this process.
jaxalign.cli.command.choose_cpu_kernels()

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_WORKERS = 4  # each takes up to 5 GB of memory


def pytest_xdist_auto_num_workers(config):
  """One more than there are cores: some wait for processes that their tests have started."""
  return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)


@pytest.fixture(scope="module")
def as_shipped():
  """The programs of a file's systems and runs are compiled with XLA's defaults (`shipped`)."""
  with shipped.programs():
    yield


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # that of all workers
  folder = folder / "xla"
  folder.mkdir(exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return folder


@pytest.fixture(scope="session", autouse=True)
def shapes_of_equal_networks():
  """Networks that are equal have the same parameters, and a worker traces them once."""
  with pytest.MonkeyPatch.context() as patch:
    trace_once(patch, Networks, lambda networks: networks)
    trace_once(patch, flow.Networks, modules_of_flow)
    yield


def trace_once(patch, networks_class, key_of):
  """Its `param_shapes` for equal keys is traced once; everyone gets dictionaries of their own."""
  trace, known = networks_class.param_shapes, {}

  def param_shapes(networks):
    key = key_of(networks)
    if key not in known:
      known[key] = trace(networks)
    return jax.tree.map(lambda leaf: leaf, known[key])

  patch.setattr(networks_class, "param_shapes", param_shapes)


def modules_of_flow(networks):
  texts = tuple(networks.text.modules.items())
  return type(networks), networks.transformer, networks.vae, texts


def pytest_collection_finish(session):
  """Modules stay, a million objects that are not looked through again."""
  del session
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def garbage_of_a_file():
  """What a file leaves is freed; what was there before it is looked through now and then only."""
  yield
  gc.collect(1 if next(_files) % 3 else 2)


_files = itertools.count(1)


@pytest.fixture
def command(compilation_cache, tmp_path_factory):
  """`command("sample", *flags, cwd=...)`: a command of the package, started as a user does."""
  import forked

  path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  forked.serve({"JAX_COMPILATION_CACHE_DIR": str(compilation_cache), "PYTHONPATH": path})

  def start(module, *flags, cwd):
    output = tmp_path_factory.mktemp("command") / module
    return forked.Command(f"jaxalign.{module}", flags, cwd=cwd, output=output)

  return start


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
  """The folder of a random model whose runs take seconds, beside pairs.jsonl of its size."""
  import device_jobs

  folder = tmp_path_factory.mktemp("small")
  device_jobs.save_pairs(folder)
  return device_jobs.save_small_model(folder / "model")


@pytest.fixture(scope="session")
def small_xl(tmp_path_factory):
  """The folder of a random Stable Diffusion XL of that size."""
  import device_jobs

  return device_jobs.save_small_xl(tmp_path_factory.mktemp("small_xl") / "model")


@pytest.fixture(scope="session")
def small_sd3(tmp_path_factory):
  """The folder of a random Stable Diffusion 3 with a T5."""
  import small_flows

  return small_flows.write("sd3", tmp_path_factory.mktemp("small_sd3") / "model")


@pytest.fixture(scope="session")
def run_case(small_model, tmp_path_factory, compilation_cache):
  """`run_case(name, meshes, model=small_model)`: finished workdirs of a case by mesh.

  Every run is made once, and those of one call at the same time.
  """
  import device_jobs

  folder, started = tmp_path_factory.mktemp("runs"), {}

  def run(name, meshes, model=small_model):
    workdirs = {mesh: folder / pathlib.Path(model).name / name / mesh for mesh in meshes}
    jobs = []
    for mesh, workdir in workdirs.items():
      if workdir not in started:
        flags = device_jobs.case_flags(name, workdir, model, *device_jobs.MESHES[mesh][1])
        devices = device_jobs.MESHES[mesh][0]
        started[workdir] = device_jobs.start(flags, compilation_cache, devices=devices)
        jobs.append(started[workdir])
    for job in jobs:
      device_jobs.finish(job)
    return workdirs

  return run


@pytest.fixture(scope="session")
def load_config():
  """`load_config("ddpo", *args)`: what `configs/ddpo.py` returns, unlocked.

  `load_config.variants("ddpo")` are the names of its variants.
  """

  def load(name, *args):
    return importlib.import_module(f"configs.{name}").get_config(*args)

  def variants(name):
    return tuple(getattr(importlib.import_module(f"configs.{name}"), "VARIANTS", ()))

  load.variants = variants
  return load


@pytest.fixture(scope="session")
def plan_pairs_file(tmp_path_factory):
  """Twelve pairs of plans of the embedded planner, the one worth more preferred."""
  pytest.importorskip("pyarrow")
  from jaxalign.recipes import planner_preferences

  folder = tmp_path_factory.mktemp("plan_pairs")
  settings = {"num_pairs": 12, "seed": 0, "temperature": 1e-3, "tie_margin": 0.0}
  compute = {"guidance_scale": 1.0, "num_steps": 4, "microbatch": 12, "split": "train"}
  planner_preferences.generate(output=folder, **settings, **compute)
  return folder / "pairs.parquet"


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
  """Eight pairs of rendered scenes, the right one preferred, and a row whose image is missing."""
  from jaxalign.worlds.shapes import prompts, scene

  folder = tmp_path_factory.mktemp("pairs")
  rng = np.random.default_rng(0)
  rows = []
  for number, prompt in enumerate(prompts.sample_prompts(rng, 8, "train")):
    names = []
    for spec in (prompt.spec, prompts.corrupt(rng, prompt.spec)):
      names.append(f"{number}_{len(names)}.png")
      Image.fromarray(scene.render(prompts.sample_scene(rng, spec))).save(folder / names[-1])
    rows.append({"prompt": prompt.text, "images": names, "label_0": 1.0})
  rows.append({"prompt": "a circle", "images": ["0_0.png", "nowhere.png"], "label_0": 1.0})
  file = folder / "pairs.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file
