"""Adapters named as hub ids, of repositories as they are published."""

import sys

import pytest

from jaxalign.models.weights import hub


class Hub:
  """Stands in for huggingface_hub: one repository of empty files in `folder`."""

  def __init__(self, folder, contents):
    self.folder, self.contents = folder, contents

  def snapshot_download(self, repo_id, allow_patterns):
    assert repo_id == "owner/name"
    for name in set(allow_patterns).intersection(self.contents):
      (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
      (self.folder / name).touch()
    return str(self.folder)

  def list_repo_files(self, repo_id):
    return list(self.contents)


@pytest.mark.parametrize(
  ("contents", "name", "found", "fetched"),
  [
    # README of latent-consistency/lcm-lora-sdv1-5, and of PEFT's adapters.
    (["pytorch_lora_weights.safetensors", "big.safetensors"], "owner/name", "", 1),
    (["adapter_model.safetensors", "adapter_config.json", "README.md"], "owner/name", "", 2),
    # nerijs/pixel-art-xl and many more: one file, of any name.
    (["pixel.safetensors", "README.md"], "owner/name", "pixel.safetensors", 1),
    # ByteDance/Hyper-SD: many files, of which one is named.
    (["a.safetensors", "b/c.safetensors"], "owner/name/b/c.safetensors", "b/c.safetensors", 1),
  ],
)
def test_adapters_of_the_hub(tmp_path, monkeypatch, contents, name, found, fetched):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "hub", contents))
  assert hub.find_adapter(name) == tmp_path / "hub" / found
  assert len([file for file in (tmp_path / "hub").rglob("*.*") if file.is_file()]) == fetched


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("owner/name", "one other .safetensors file, found a.safetensors, b.safetensors"),
    ("owner/name/c.safetensors", "expected the file c.safetensors in owner/name"),
    ("nothing", "found no such file"),
    ("./owner/name", "found no such file"),
    ("owner/name.safetensors", "found no such file"),
  ],
)
def test_adapters_that_are_nowhere(tmp_path, monkeypatch, name, words):
  monkeypatch.chdir(tmp_path)
  contents = ["a.safetensors", "b.safetensors"]
  (tmp_path / "hub").mkdir()
  monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "hub", contents))
  with pytest.raises(ValueError, match=words) as caught:
    hub.find_adapter(name)
  assert len(str(caught.value).splitlines()) <= 3
  (tmp_path / "owner").mkdir()
  (tmp_path / "owner" / "name").mkdir()
  assert str(hub.find_adapter("owner/name")) == "owner/name"  # what is here comes first
