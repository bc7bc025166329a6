"""Names of devices that are only described, and what is said where they cannot be had."""

import importlib.util

import pytest

from jaxalign.aot import topology

HAS_GPU_COMPILER = importlib.util.find_spec("jax_cuda13_plugin") is not None
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize("name", ["", "8", "8xb100", "h100:8", "-1xh100", "v5e", "v9:2x2"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
  with pytest.raises(ValueError, match="a100, h100, h200") as error:
    topology.find_devices(name)
  assert "v5e" in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name, fitting", [("12xh100", "8xh100"), ("0xa100", "8xa100")])
def test_hosts_are_whole(name, fitting):
  with pytest.raises(ValueError, match=f"such as {fitting}"):
    topology.find_devices(name)


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="it is installed")
def test_without_the_compiler_for_gpus_one_line_says_what_to_install():
  with pytest.raises(ValueError, match=r'pip install "jaxalign\[aot-gpu\]"'):
    topology.find_devices("8xh100")


@pytest.mark.skipif(HAS_TPU_COMPILER, reason="it is installed")
def test_without_the_compiler_for_tpus_one_line_says_what_to_install():
  with pytest.raises(ValueError, match=r'pip install "jaxalign\[aot-tpu\]"'):
    topology.find_devices("v5e:2x4")


class Device:
  platform, compute_capability = "gpu", "9.0"


def test_questions_are_answered_and_then_put_back():
  from jax._src.cudnn import fused_attention_stablehlo as asking

  names = ("check_compute_capability", "is_cuda_compute_capability_equal", "check_cudnn_version")
  before = [getattr(asking, name) for name in names]
  described = topology.Topology("h100", [Device()], topology.GPUS["h100"])
  with pytest.raises(KeyError), topology.answering_for(described):
    assert asking.check_compute_capability("8.0") and asking.check_compute_capability("9.0")
    assert not asking.check_compute_capability("10.0")
    assert asking.is_cuda_compute_capability_equal("9.0")
    assert asking.check_cudnn_version() >= 90000
    raise KeyError
  assert [getattr(asking, name) for name in names] == before


def test_for_tpus_nothing_is_replaced():
  from jax._src.cudnn import fused_attention_stablehlo as asking

  class Tpu:
    platform = "tpu"

  before = asking.check_cudnn_version
  with topology.answering_for(topology.Topology("v5e:2x2", [Tpu()], topology.TPUS["v5e"])):
    assert asking.check_cudnn_version is before


@pytest.mark.parametrize("kind", topology.GPUS)
def test_a_description_holds_the_facts(kind):
  text = topology._target(kind)
  assert f"device_memory_size: {topology.GPUS[kind].memory}" in text
  assert text.count("{") == text.count("}")
  assert ("major: 9 feature" in text) == (kind != "a100")
