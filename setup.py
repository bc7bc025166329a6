"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxalign/__init__.py").read_text())[1]

DATA = ["pyarrow>=18.0"]
DIFFUSERS = ["diffusers>=0.35", "peft>=0.17", "accelerate>=1.0"]

setuptools.setup(
  name="jaxalign",
  version=VERSION,
  description="Aligning diffusion and flow models with preferences, in JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["jaxalign", "jaxalign.*"]),
  package_data={"jaxalign.worlds": ["assets/**/*"]},
  include_package_data=True,
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "flax>=0.12",
    "huggingface_hub>=0.30",
    "jax>=0.10",
    "matplotlib>=3.8",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.20",
    "pillow>=10.0",
    "safetensors>=0.5",
    "scipy>=1.12",
    "tensorboardX>=2.6",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "transformers>=5.0",
  ],
  extras_require={
    # Compilers for devices that need not be there (--topology).
    "aot-gpu": ["jax[cuda13]>=0.10"],
    "aot-tpu": ["jax[tpu]>=0.10"],
    "cuda12": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "data": DATA,
    "diffusers": DIFFUSERS,
    "test": ["pytest>=8.0", "pytest-xdist>=3.6", "torch==2.13.0", *DIFFUSERS, *DATA],
    "dev": ["mypy>=1.10", "ruff>=0.8"],
  },
)
