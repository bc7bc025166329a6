"""Names of models: folders, files, and repositories on a hub that is served on this machine."""

import fnmatch
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from jaxalign.models.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_folder_names(tmp_path, monkeypatch):
  assert hub.find_folder(tmp_path) == tmp_path
  assert hub.find_folder("shapes").parts[-3:] == ("worlds", "assets", "shapes")
  with pytest.raises(ValueError, match=r"no model folder at .*nothing.*'shapes'"):
    hub.find_folder(tmp_path / "nothing")
  with pytest.raises(ValueError, match="no model folder"):
    hub.find_folder("./nothing")
  checkpoint = tmp_path / "v1-5.safetensors"
  checkpoint.touch()
  assert hub.find_model(checkpoint) == checkpoint
  with pytest.raises(ValueError, match=r"expected the folder of a model, .* found a file"):
    hub.find_folder(checkpoint)
  with pytest.raises(ValueError, match=r"no file .*v1-6\.safetensors"):
    hub.find_model("v1-6.safetensors")
  (tmp_path / "v1-5.onnx").touch()
  with pytest.raises(ValueError, match=r"v1-5\.onnx: expected a \.safetensors file"):
    hub.find_model(tmp_path / "v1-5.onnx")
  (tmp_path / "v1-5.ckpt").touch()
  with pytest.raises(ValueError, match=r"v1-5\.ckpt, a pickle"):
    hub.find_model(tmp_path / "v1-5.ckpt")


def test_tokenizer_folders(tmp_path):
  assert hub.find_tokenizer(tmp_path) == tmp_path
  (tmp_path / "tokenizer").mkdir()
  assert hub.find_tokenizer(tmp_path) == tmp_path / "tokenizer"
  assert hub.find_tokenizer("shapes") == hub.find_folder("shapes") / "tokenizer"


class _Hub:
  """Stands in for huggingface_hub: repositories hold the given files, all of them empty."""

  def __init__(self, folder, contents, error=None):
    self.folder, self.contents, self.error, self.calls = folder, contents, error, []

  def snapshot_download(self, repo_id, allow_patterns):
    if self.error:
      raise self.error
    self.calls.append(allow_patterns)
    for name in self.contents:
      if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).touch()
    return os.fspath(self.folder)


REPOSITORY = [
  "model_index.json",
  "v1-5-pruned.ckpt",
  "unet/config.json",
  "unet/diffusion_pytorch_model{}.safetensors",
  "unet/diffusion_pytorch_model.bin",
  "vae/diffusion_pytorch_model{}.safetensors",
  "text_encoder/model{}.safetensors",
  "safety_checker/model{}.safetensors",
  "tokenizer/vocab.json",
]


XL = [
  "text_encoder_2/config.json",
  "text_encoder_2/model{}.safetensors",
  "tokenizer_2/vocab.json",
]
SHARDED = [
  "unet/diffusion_pytorch_model.safetensors.index{}.json",
  "unet/diffusion_pytorch_model{}-00001-of-00002.safetensors",
  "unet/diffusion_pytorch_model{}-00002-of-00002.safetensors",
]


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
def test_hub_download_takes_shards_and_second_text_encoders(tmp_path, monkeypatch, variant):
  contents = [name.format(variant) for name in [*REPOSITORY, *XL, *SHARDED]]
  contents.remove(REPOSITORY[3].format(variant))
  unwanted = [REPOSITORY[1], REPOSITORY[4], REPOSITORY[7].format(variant)]
  stand_in = _Hub(tmp_path, [*contents, "unet/flax_model.msgpack"])
  monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
  hub.find_model("owner/name")
  fetched = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*") if file.is_file()}
  assert fetched == set(contents) - set(unwanted)


def test_configs_and_tokenizers_come_without_weights(tmp_path, monkeypatch):
  contents = [name.format("") for name in REPOSITORY]
  monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path / "a", contents))
  assert hub.find_folder("owner/name") == tmp_path / "a"
  assert hub.find_tokenizer("owner/name") == tmp_path / "a" / "tokenizer"
  assert not list(tmp_path.rglob("*.safetensors"))
  contents = ["vocab.json", "merges.txt", "tokenizer_config.json", "model.safetensors"]
  monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path / "b", contents))
  assert hub.find_tokenizer("owner/name") == tmp_path / "b"
  assert {path.name for path in (tmp_path / "b").iterdir()} == set(contents[:3])


@pytest.mark.parametrize(("variant", "num_calls"), [("", 1), (".fp16", 2), (".non_ema", 4)])
def test_hub_download_takes_only_what_is_read(tmp_path, monkeypatch, variant, num_calls):
  stand_in = _Hub(tmp_path, [name.format(variant) for name in REPOSITORY])
  monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
  assert hub.find_model("owner/name") == tmp_path
  assert len(stand_in.calls) == num_calls
  fetched = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*") if file.is_file()}
  unwanted = {REPOSITORY[1], REPOSITORY[4], REPOSITORY[7].format(variant)}
  assert fetched == {name.format(variant) for name in REPOSITORY} - unwanted


def test_hub_failure_is_a_short_value_error(tmp_path, monkeypatch):
  stand_in = _Hub(tmp_path, [], error=ConnectionError("no route\nto host\nat all"))
  monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
  with pytest.raises(ValueError, match="'owner/name'") as caught:
    hub.find_model("owner/name")
  assert len(str(caught.value).splitlines()) == 3
  assert "ConnectionError: no route" in str(caught.value)


class _Server(http.server.ThreadingHTTPServer):
  """The part of the hub's interface that a snapshot takes, for one repository."""

  def __init__(self, folder):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.folder, self.tokens, self.sent = folder, set(), set()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    server = self.server
    server.tokens.add(self.headers.get("Authorization"))
    if self.headers.get("Authorization") != "Bearer secret":
      return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no access"})
    path = self.path.split("?")[0]
    if "/resolve/" not in path:
      names = sorted(str(p.relative_to(server.folder)) for p in server.folder.rglob("*.*"))
      names = [name for name in names if (server.folder / name).is_file()]
      if "/tree/" in path:
        content = [
          {"type": "file", "path": n, "size": (server.folder / n).stat().st_size, "oid": "0"}
          for n in names
        ]
      else:
        siblings = [{"rfilename": name} for name in names]
        content = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
      return self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
    name = path.split(f"/resolve/{COMMIT}/")[1]
    body = (server.folder / name).read_bytes()
    if self.command == "GET":
      server.sent.add(name)
    etag = hashlib.sha256(body).hexdigest()
    return self.answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

  def answer(self, status, body, headers):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)


@pytest.fixture
def served(small_model):
  server = _Server(small_model)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield server
  server.shutdown()
  thread.join()
  server.server_close()


def find(cache, server, **environment):
  """`hub.find_model` in a process of its own: huggingface_hub reads its environment only once."""
  program = """
import sys
from jaxalign.models.weights import hub
try:
  print(hub.find_model("owner/name"))
except ValueError as error:
  sys.exit(f"refused: {error}")
"""
  port = server.server_address[1]
  environment = {
    **os.environ,
    "HF_ENDPOINT": f"http://127.0.0.1:{port}",
    "HF_HUB_CACHE": str(cache),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    **environment,
  }
  return subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
  )


def test_token_and_offline_mode_are_those_of_huggingface_hub(served, tmp_path):
  refused = find(tmp_path, served, HF_TOKEN="wrong")
  assert refused.returncode == 1 and refused.stderr.startswith("refused: no folder 'owner/name'")
  assert "logged in" in refused.stderr and "Bearer wrong" in served.tokens
  found = find(tmp_path, served, HF_TOKEN="secret")
  assert found.returncode == 0, found.stderr
  assert "unet/diffusion_pytorch_model.safetensors" in served.sent
  served.sent.clear()
  served.tokens.clear()
  again = find(tmp_path, served, HF_HUB_OFFLINE="1")
  assert again.stdout == found.stdout
  assert not served.tokens and not served.sent
  nothing = find(tmp_path / "empty", served, HF_HUB_OFFLINE="1")
  assert nothing.returncode == 1 and nothing.stderr.startswith("refused: no folder 'owner/name'")
