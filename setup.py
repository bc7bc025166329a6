"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxalign/__init__.py").read_text("utf-8"))[1]

DATA = ["pyarrow>=26.0.1"]
# Oracles that we are compared with. They bring PyTorch, several GB of CUDA unless it is there.
PARITY = ["diffusers>=0.42.1", "peft>=0.21.2", "accelerate>=1.15.0"]

setuptools.setup(
  name="jaxalign",
  version=VERSION,
  description="Aligning diffusion and flow models with preferences, in JAX",
  long_description=(HERE / "README.md").read_text("utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=[*setuptools.find_packages(include=["jaxalign", "jaxalign.*"]), "jaxalign.configs"],
  package_dir={"jaxalign.configs": "configs"},  # beside the package in a clone, inside it elsewhere
  package_data={"jaxalign.worlds": ["assets/**/*"]},
  include_package_data=True,
  python_requires=">=3.11",
  # Floors are what was tested.
  install_requires=[
    "absl-py>=2.5.1",
    "flax>=0.12.8",
    "huggingface_hub>=2.4.0",
    "jax>=0.10.2",
    "jinja2>=3.1.6",
    "matplotlib>=3.11.2",
    "ml_collections>=1.1.0",
    "numpy>=2.4.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0.0",
    "safetensors>=0.8.0",
    "scipy>=1.17.1",
    "tensorboardX>=2.6.5",
    "tokenizers>=0.23.3",
    "tqdm>=4.70.1",
    "transformers>=5.24.0",
  ],
  extras_require={
    # Compilers for devices that need not be there (--topology).
    "aot-gpu": ["jax[cuda13]>=0.10.2"],
    "aot-tpu": ["jax[tpu]>=0.10.2"],
    "cuda12": ["jax[cuda12]>=0.10.2"],
    "cuda13": ["jax[cuda13]>=0.10.2"],
    "data": DATA,
    "parity": PARITY,
    "test": ["pytest>=9.2.0", "pytest-xdist>=3.8.0", "torch==2.13.0", *PARITY, *DATA],
    "dev": ["mypy>=2.4.1", "ruff>=0.17.6"],
  },
)
