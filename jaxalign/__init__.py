"""Aligning diffusion and flow models with preferences, in JAX."""

__version__ = "0.1.0"
