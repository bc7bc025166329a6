"""Shared by all tests: a compilation cache, so that no program is compiled twice."""

import importlib.util
import pathlib

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp("xla")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  return folder


@pytest.fixture(scope="session")
def load_config():
  """`load_config("ddpo", *args)`: what `configs/ddpo.py` returns, unlocked."""

  def load(name, *args):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)

  return load
