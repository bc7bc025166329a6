"""Machine code as a user's is, for claims about the last places of two different programs.

All tests compile at XLA's level 0 (conftest.py), where a program is made in a third of the time and
computes the same steps in the same order. Whether two programs round alike is a question to the
level that runs have, the default.
"""

import contextlib
import functools
from collections.abc import Iterator

import pytest

from jaxalign.distributed import placement

OPTIONS = {"xla_backend_optimization_level": 3}


@contextlib.contextmanager
def programs() -> Iterator[None]:
  """Programs of the systems and runs that are made in the block are compiled so."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "jit", functools.partial(placement.jit, compiler_options=OPTIONS))
    yield
