"""Machine code that is made soon rather than fast, for a few runs of small programs.

A program computes the same steps in the same order; only its last places may differ. So it is for
what is compared with a tolerance, or not at all, and never for what is compared to the bit.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import jax
import pytest

from jaxalign.distributed import placement

OPTIONS = {"xla_backend_optimization_level": 0}

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def environment() -> dict[str, str]:
  """The same for all programs of a process that has not started JAX."""
  options = [f"--{name}={value}" for name, value in OPTIONS.items()]
  return {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *options])}


@contextlib.contextmanager
def programs() -> Iterator[None]:
  """Programs of the systems and runs that are made in the block are compiled so."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "jit", functools.partial(placement.jit, compiler_options=OPTIONS))
    yield
