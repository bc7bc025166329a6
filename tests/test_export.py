"""Out and in: exports against diffusers, adapter files of every origin, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from jaxalign import export, system, train
from jaxalign.cli import command, source
from jaxalign.models.adapters import lora
from jaxalign.models.families import stable_diffusion
from jaxalign.models.weights import lora_files, safetensors_io
from jaxalign.training import checkpoint
from jaxalign.training import workdir as workdir_lib

PROMPTS = ["a red circle", "two blue squares"]
NUM_STEPS, SCALE = 4, 3.0
# Attention, feed-forward, 1 x 1 and 3 x 3 convolutions, with and without stride.
TARGETS = r"to_[qkv]$|to_out_0$|net_2$|proj_in$|conv1$|conv_in$"


def random_adapter(params, rank=4, seed=0, scale=0.05):
  """An adapter that changes something: `lora.init` leaves `b` zero."""
  shapes = jax.eval_shape(
    lambda: lora.init(jax.random.key(0), params, rank=rank, targets=TARGETS)
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: np.float32(scale) * rng.standard_normal(leaf.shape, np.float32), shapes
  )


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  path = tmp_path_factory.mktemp("latents") / "noise.npy"
  np.save(path, np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32))
  return path


@pytest.fixture(scope="module")
def unet(small_model):
  return stable_diffusion.load(small_model).params["unet"]


@pytest.fixture(scope="module", params=["1.x", "xl"])
def any_model(request, small_model):
  return small_model if request.param == "1.x" else request.getfixturevalue("small_xl")


@pytest.fixture(scope="module")
def make_config(load_config):
  """`make_config(model, rank)`: of a run that makes images as `sample` here does."""

  def make(model, rank):
    config = load_config("ddpo", "quicktest")
    config.model.path = str(model)
    config.lora.update({"rank": rank, "alpha": 6.0, "targets": TARGETS if rank else "conv_in|to_q"})
    config.process.num_steps = NUM_STEPS
    config.guidance.scale = SCALE
    return config

  return make


@pytest.fixture(scope="module")
def make_run(make_config, tmp_path_factory):
  """`make_run(model, rank)`: the workdir of a run whose one checkpoint has random numbers added."""

  def make(model, rank):
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(model, rank)
    with workdir_lib.prepared(workdir, config):
      pass
    params = system.from_config(config.to_dict()).policy.params
    rng = np.random.default_rng(rank)
    params = jax.tree.map(
      lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), params
    )
    manager = checkpoint.Manager(workdir, every=1, keep=1)
    manager.save(3, {"params": params, "copies": {}}, force=True)
    manager.close()
    return workdir

  return make


@pytest.fixture(scope="module")
def lora_run(make_run, small_model):
  return make_run(small_model, 4)


@pytest.fixture(scope="module")
def full_run(make_run, small_model):
  return make_run(small_model, 0)


@pytest.fixture(scope="module")
def trained_adapter(make_config, any_model, tmp_path_factory):
  """The workdir of two iterations of DDPO on adapters, with steps that show."""
  config = make_config(any_model, 4)
  config.optim.learning_rate = 0.03
  config.reward.names = ("jpeg_compressibility",)
  config.evaluation.rewards = ("jpeg_compressibility",)
  workdir = tmp_path_factory.mktemp("trained")
  train.train(config, workdir)
  return workdir


def given(*arguments):
  """The flags of `source` and `export`, as from a command line."""
  return command.parse(export.define_flags, *arguments)


@pytest.fixture
def sample(latents, capsys):
  """`sample(*flags)`: images as `python -m jaxalign.sample` makes them, and what stderr says."""

  def images(*arguments):
    process, guidance = {"num_steps": NUM_STEPS, "eta": 0.0}, {"scale": SCALE}
    values = given(*arguments)
    if source.workdir(values) is None:
      sys, params = source.load_model(values, {"transition": "ddim", **process}, guidance)
    else:
      found = source.load_run(values, process=process, guidance=guidance)
      sys, params = found.system, found.params
    token_ids, x_T = sys.model.tokenize([{"prompt": p} for p in PROMPTS]), np.load(latents)
    args = (token_ids, x_T, jax.random.key(0), sys.pipeline.table)
    sampled = jax.jit(sys.sample)(params, sys.frozen, *args)
    return np.asarray(sampled.samples), capsys.readouterr().err

  return images


@pytest.fixture
def to_folder(tmp_path):
  """`to_folder(*flags)`: the folder that `python -m jaxalign.export` writes."""

  def run_export(*arguments, output="exported"):
    export.main(given(*arguments, f"--output={tmp_path / output}"))
    return tmp_path / output

  return run_export


def load_pipeline(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def sample_with_diffusers(pipeline, latents):
  import torch

  noise = np.load(latents).transpose(0, 3, 1, 2)
  return pipeline(
    PROMPTS,
    latents=torch.from_numpy(noise),
    num_inference_steps=NUM_STEPS,
    guidance_scale=SCALE,
    eta=0.0,
    height=16,
    width=16,
    output_type="np",
  ).images


def assert_same_images(ours, theirs, base):
  assert np.abs(ours - theirs).max() < 2e-3
  assert np.abs(ours - base).max() > 0.02  # the adapter has done something


def test_a_trained_adapter_gives_the_same_images_in_diffusers(
  trained_adapter, any_model, sample, to_folder, latents
):
  pytest.importorskip("peft")
  folder = to_folder(f"--workdir={trained_adapter}", "--format=lora")
  assert {file.name for file in folder.iterdir()} == {lora_files.FILENAME, "jaxalign_export.json"}
  pipeline = load_pipeline(any_model)
  base = sample_with_diffusers(pipeline, latents)
  pipeline.load_lora_weights(folder)
  theirs = sample_with_diffusers(pipeline, latents)
  ours, errors = sample(f"--model={any_model}", f"--lora={folder}")
  assert "not used" not in errors
  assert_same_images(ours, theirs, base)
  of_run, _ = sample(f"--workdir={trained_adapter}")
  np.testing.assert_allclose(ours, of_run, atol=1e-4)
  pipeline.set_adapters(["default_0"], [0.5])
  theirs = sample_with_diffusers(pipeline, latents)
  ours, _ = sample(f"--model={any_model}", f"--lora={folder}", "--strength=0.5")
  assert_same_images(ours, theirs, base)


@pytest.mark.parametrize("kind", ["trained adapter", "all weights"])
def test_an_exported_model_gives_the_same_images_in_diffusers(
  kind, trained_adapter, make_run, any_model, sample, to_folder, latents
):
  workdir = trained_adapter if kind == "trained adapter" else make_run(any_model, 0)
  folder = to_folder(f"--workdir={workdir}", "--format=diffusers")
  theirs = sample_with_diffusers(load_pipeline(folder), latents)
  base = sample_with_diffusers(load_pipeline(any_model), latents)
  ours, _ = sample(f"--workdir={workdir}")
  assert_same_images(ours, theirs, base)


def test_exported_weights_are_those_of_the_run_bit_for_bit(full_run, small_model, to_folder):
  trained = checkpoint.read_latest(full_run)[1]["params"]["params"]
  before = stable_diffusion.load(small_model).params
  after = stable_diffusion.load(to_folder(f"--workdir={full_run}", "--format=diffusers")).params
  np.testing.assert_array_equal(after["unet"]["conv_in"]["kernel"], trained["conv_in"]["kernel"])
  assert np.any(after["unet"]["conv_in"]["kernel"] != before["unet"]["conv_in"]["kernel"])
  for name in ("vae", "text_encoder"):
    jax.tree.map(np.testing.assert_array_equal, after[name], before[name])


def test_an_exported_adapter_holds_what_the_run_applies_bit_for_bit(lora_run, to_folder, unet):
  found = workdir_lib.load(lora_run)
  applied = found.system.policy.variables(found.params, found.system.policy.base)["lora"]
  folder = to_folder(f"--workdir={lora_run}", "--format=lora")
  again = lora_files.read(folder, {"unet": unet})
  jax.tree.map(np.testing.assert_array_equal, again.at_strength(1.0)["unet"], applied)
  record = json.loads((folder / "jaxalign_export.json").read_text())
  assert record["iteration"] == 3 and record["format"] == "lora"


def test_exporting_the_base_and_half_of_the_training(lora_run, small_model, to_folder):
  flags = (f"--workdir={lora_run}", "--format=diffusers", "--strength=0")
  after, before = (stable_diffusion.load(path).params for path in (to_folder(*flags), small_model))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  whole, half = (
    safetensors.numpy.load_file(
      to_folder(f"--workdir={lora_run}", "--format=lora", f"--strength={s}") / lora_files.FILENAME
    )
    for s in (1.0, 0.5)
  )
  for name, tensor in whole.items():
    factor = np.float32(0.5 if "lora_B" in name else 1.0)
    np.testing.assert_array_equal(half[name], factor * tensor)


def test_a_run_without_an_adapter_has_none_to_export(full_run, command, tmp_path):
  flags_of_run = (f"--workdir={full_run}", "--format=lora", "--output=exported")
  process = command("export", *flags_of_run, cwd=tmp_path)
  _, errors = process.communicate()
  assert process.returncode == 1
  assert errors.startswith("error: ") and "Traceback" not in errors
  assert "--format=diffusers" in errors and len(errors.splitlines()) <= 3
  assert not list(tmp_path.iterdir())


def test_only_an_export_is_replaced(lora_run, to_folder, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  (tmp_path / "a_file").write_text("")
  for output, words in (("mine", "not empty"), ("a_file", "expected a folder")):
    with pytest.raises(ValueError, match=words):
      to_folder(f"--workdir={lora_run}", "--format=lora", output=output)
  assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
  to_folder(f"--workdir={lora_run}", "--format=diffusers")
  folder = to_folder(f"--workdir={lora_run}", "--format=lora")
  assert {file.name for file in folder.iterdir()} == {lora_files.FILENAME, "jaxalign_export.json"}
  assert {path.name for path in tmp_path.iterdir()} == {"mine", "a_file", "exported"}


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--workdir=run", "--lora=file"), "--lora: expected --model"),
    (("--workdir=run", "--tokenizer=shapes"), "--tokenizer: expected --model"),
    (("--model=shapes", "--strength=0.5"), "--strength: expected --workdir or --lora"),
    (("--model=shapes", "--best"), "--best: expected --workdir"),
    (("--model=shapes", "--newest"), "--newest: expected --workdir"),
    (("--workdir=run", "--best", "--newest"), "expected one of --best and --newest"),
    (("--model=shapes", "--lora=missing.safetensors"), r"missing\.safetensors, found no such file"),
    (("--model=shapes", "--output="), "expected --output"),
    ((), "expected one of --model and --workdir"),
  ],
)
def test_flags_that_do_not_go_together(to_folder, tmp_path, arguments, words):
  with pytest.raises((ValueError, flags.Error), match=words):
    export.main(given(f"--output={tmp_path / 'exported'}", *arguments))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("alpha", "with_metadata"), [(6, True), (8, False)])
def test_an_adapter_made_by_peft_gives_the_same_images_here(
  alpha, with_metadata, any_model, sample, latents, tmp_path
):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from diffusers import training_utils

  pipeline = load_pipeline(any_model)
  base = sample_with_diffusers(pipeline, latents)
  config = peft.LoraConfig(
    r=4,
    lora_alpha=alpha,
    target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"],
    alpha_pattern={"attn2.to_q": 2 * alpha},
    init_lora_weights="gaussian",
  )
  torch.manual_seed(0)
  pipeline.unet.add_adapter(config)
  with torch.no_grad():
    for name, parameter in pipeline.unet.named_parameters():
      if "lora_B" in name:
        parameter.normal_(std=0.2)
  metadata = training_utils._collate_lora_metadata({"unet": pipeline.unet})
  layers = peft.get_peft_model_state_dict(pipeline.unet)
  pipeline.save_lora_weights(tmp_path / "made", layers, **(metadata if with_metadata else {}))
  reader = load_pipeline(any_model)
  reader.load_lora_weights(tmp_path / "made")
  theirs = sample_with_diffusers(reader, latents)
  ours, errors = sample(f"--model={any_model}", f"--lora={tmp_path / 'made'}")
  assert "not used" not in errors
  assert_same_images(ours, theirs, base)
  if with_metadata:  # else the alpha is lost to every reader
    assert_same_images(ours, sample_with_diffusers(pipeline, latents), base)


def test_adapters_of_the_text_encoder_are_applied(small_model, sample, latents, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  pipeline = load_pipeline(small_model)
  base = sample_with_diffusers(pipeline, latents)
  config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "out_proj", "fc1"])
  torch.manual_seed(0)
  peft.inject_adapter_in_model(config, pipeline.text_encoder)
  with torch.no_grad():
    for name, parameter in pipeline.text_encoder.named_parameters():
      if "lora_B" in name:
        parameter.normal_(std=0.5)
  layers = {
    name.replace(".default", ""): tensor
    for name, tensor in pipeline.text_encoder.state_dict().items()
    if "lora_" in name
  }
  pipeline.save_lora_weights(tmp_path / "made", text_encoder_lora_layers=layers)
  ours, errors = sample(f"--model={small_model}", f"--lora={tmp_path / 'made'}")
  assert "not used" not in errors
  assert_same_images(ours, sample_with_diffusers(pipeline, latents), base)


def test_the_commands_take_adapters_and_report_what_fits_no_layer(
  small_model, unet, command, sample, latents, tmp_path
):
  path = lora_files.write(tmp_path, "unet", random_adapter(unet))
  tensors = safetensors.numpy.load_file(path)
  others = [f"text_encoder_2.text_model.encoder.layers.{i}.mlp.fc1.lora_A.weight" for i in (0, 1)]
  safetensors.numpy.save_file({**tensors, **{name: np.zeros((2, 2)) for name in others}}, path)
  model = (f"--model={small_model}", f"--lora={path}", "--strength=0.5")
  drawn = (
    *(f"--prompt={prompt}" for prompt in PROMPTS),
    *(f"--num_steps={NUM_STEPS}", f"--guidance_scale={SCALE}", f"--latents={latents}"),
    *("--output_type=npy", "--output=images"),
  )
  judged = ("--rewards=jpeg_compressibility", "--prompts=shapes/held_out", "--num_images=2")
  for name, arguments in (("sample", drawn), ("evaluate", (*judged, "--num_steps=2"))):
    process = command(name, *model, *arguments, cwd=tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"--lora: 2 tensors fit no layer and are not used, such as {others[0]}" in errors
  assert printed.startswith("jpeg_compressibility")
  expected, _ = sample(*model)
  np.testing.assert_allclose(np.load(tmp_path / "images" / "images.npy"), expected, atol=1e-5)


def test_a_merged_model_and_its_folder_are_one_export(small_model, unet, to_folder, tmp_path):
  """--model with --lora is merged into a whole pipeline; the model itself is left as it was."""
  adapter = random_adapter(unet)
  (tmp_path / "adapter").mkdir()
  lora_files.write(tmp_path / "adapter", "unet", adapter)
  shutil.copytree(small_model, tmp_path / "copy")
  flags = (f"--model={tmp_path / 'copy'}", f"--lora={tmp_path / 'adapter'}")
  merged = stable_diffusion.load(to_folder(*flags)).params["unet"]
  expected = lora.merge(unet, adapter)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
  kept = safetensors_io.read_component(tmp_path / "copy" / "unet", unet)
  jax.tree.map(np.testing.assert_array_equal, kept, unet)
