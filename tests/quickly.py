"""`jit` for a few runs of a small program: its machine code need not be fast, only made soon."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
