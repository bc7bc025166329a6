"""How tests compile; and as users do, for claims about last places and for long runs.

All tests compile quickly (`QUICKLY`, set by conftest.py): a program is made in a quarter of the
time and computes the same steps in the same order. Whether two programs round alike is a question
to what users run, XLA's defaults; and where a small program runs thousands of times, these are
faster.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest

from jaxalign.distributed import placement

# The lowest level of LLVM, and loops that XLA emits itself and not through MLIR. The second is no
# flag of jaxlib 0.12, which emits through MLIR only; as an extra option it is left alone there.
QUICKLY = (
  "--xla_backend_optimization_level=0"
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
OPTIONS = {"xla_backend_optimization_level": 3, "xla_backend_extra_options": ""}

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


@contextlib.contextmanager
def programs(*names: str) -> Iterator[None]:
  """Programs of the systems and runs that are made in the block are compiled as shipped.

  All of them, or those of these names, each of which must be made.
  """
  quickly, met = placement.jit, set()

  def chosen(function, mesh, **kwargs):
    name = getattr(function, "__name__", "")
    met.add(name)
    options = OPTIONS if not names or name in names else None
    return quickly(function, mesh, compiler_options=options, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "jit", chosen)
    yield
  assert met.issuperset(names), f"no program is called {sorted(set(names) - met)}"
