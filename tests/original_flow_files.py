"""Small flow transformers, and their tensors in the layout of the original publications.

Written by hand, without the names of `weights.original_sd3` and `original_flux`, which are tested
by it.
"""

import functools

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch_trees = pytest.importorskip("torch_trees")

SD3 = {
  "sample_size": 128,
  "in_channels": 3,
  "out_channels": 5,
  "num_layers": 3,
  "attention_head_dim": 64,
  "num_attention_heads": 1,
  "joint_attention_dim": 20,
  "caption_projection_dim": 64,
  "pooled_projection_dim": 10,
  "pos_embed_max_size": 3,
}
MEDIUM_35 = {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1], "attention_head_dim": 16}
FLUX1 = {
  "in_channels": 12,
  "num_layers": 2,
  "num_single_layers": 2,
  "attention_head_dim": 128,
  "num_attention_heads": 1,
  "joint_attention_dim": 20,
  "pooled_projection_dim": 10,
}
FLUX2 = {
  **{name: value for name, value in FLUX1.items() if name != "pooled_projection_dim"},
  "timestep_guidance_channels": 24,
}
# name -> (class, config)
MODULES = {
  "sd3": ("SD3Transformer2DModel", SD3),
  "sd3 dual": ("SD3Transformer2DModel", {**SD3, **MEDIUM_35, "num_attention_heads": 4}),
  "flux1 dev": ("FluxTransformer2DModel", {**FLUX1, "guidance_embeds": True}),
  "flux1 schnell": ("FluxTransformer2DModel", {**FLUX1, "guidance_embeds": False}),
  "flux2 dev": ("Flux2Transformer2DModel", {**FLUX2, "out_channels": 8}),
  "flux2 klein": ("Flux2Transformer2DModel", {**FLUX2, "guidance_embeds": False}),
}


class Moved:
  """Tensors on their way to the original layout, taken out of what is left of diffusers'."""

  def __init__(self, tensors):
    self.left, self.file = dict(tensors), {}

  def move(self, theirs, *ours, swap=False, leaf=None):
    """Stacks modules of ours, or swaps the halves of one; a bias goes where there is one."""
    for end in ("weight", "bias"):
      if f"{ours[0]}.{end}" in self.left:
        parts = [self.left.pop(f"{one}.{end}") for one in ours]
        if swap:
          scale, shift = parts[0].chunk(2)
          parts = [shift, scale]
        self.file[f"{theirs}.{leaf or end}"] = torch.cat(parts)

  def ends(self):
    self.move("final_layer.linear", "proj_out")
    self.move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    assert not self.left
    return self.file


def sd3_file(tensors, layers):
  moved = Moved(tensors)
  moved.file["pos_embed"] = moved.left.pop("pos_embed.pos_embed")
  moved.move("x_embedder.proj", "pos_embed.proj")
  moved.move("context_embedder", "context_embedder")
  for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
    for i in (1, 2):
      moved.move(f"{theirs}.mlp.{2 * i - 2}", f"time_text_embed.{ours}.linear_{i}")
  for k in range(layers):
    here, there = f"transformer_blocks.{k}", f"joint_blocks.{k}"
    image, text = f"{there}.x_block", f"{there}.context_block"
    moved.move(f"{image}.adaLN_modulation.1", f"{here}.norm1.linear")
    last = k == layers - 1
    moved.move(f"{text}.adaLN_modulation.1", f"{here}.norm1_context.linear", swap=last)
    moved.move(f"{text}.attn.qkv", *(f"{here}.attn.add_{part}_proj" for part in "qkv"))
    moved.move(f"{text}.attn.proj", f"{here}.attn.to_add_out")
    for attn in ("attn", "attn2"):
      moved.move(f"{image}.{attn}.qkv", *(f"{here}.{attn}.to_{part}" for part in "qkv"))
      moved.move(f"{image}.{attn}.proj", f"{here}.{attn}.to_out.0")
      for part in "qk":
        moved.move(f"{image}.{attn}.ln_{part}", f"{here}.{attn}.norm_{part}")
        moved.move(f"{text}.{attn}.ln_{part}", f"{here}.{attn}.norm_added_{part}")
    for there, ff in ((image, "ff"), (text, "ff_context")):
      moved.move(f"{there}.mlp.fc1", f"{here}.{ff}.net.0.proj")
      moved.move(f"{there}.mlp.fc2", f"{here}.{ff}.net.2")
  return moved.ends()


def flux_file(tensors, layers, single_layers, second):
  moved, embeds = Moved(tensors), "time_guidance_embed" if second else "time_text_embed"
  moved.move("img_in", "x_embedder")
  moved.move("txt_in", "context_embedder")
  for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
    moved.move(f"{theirs}_in.in_layer", f"{embeds}.{ours}_embedder.linear_1")
    moved.move(f"{theirs}_in.out_layer", f"{embeds}.{ours}_embedder.linear_2")
  for name in ("double_stream_modulation_img", "double_stream_modulation_txt"):
    moved.move(f"{name}.lin", f"{name}.linear")
  moved.move("single_stream_modulation.lin", "single_stream_modulation.linear")
  first, last = ("linear_in", "linear_out") if second else ("net.0.proj", "net.2")
  streams = (
    ("img", "to_{}", "to_out.0", "norm_{}", "norm1", "ff"),
    ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "norm1_context", "ff_context"),
  )
  for k in range(layers):
    for stream, projection, out, norm, modulation, ff in streams:
      there, here = f"double_blocks.{k}.{stream}", f"transformer_blocks.{k}"
      moved.move(f"{there}_mod.lin", f"{here}.{modulation}.linear")
      moved.move(f"{there}_attn.qkv", *(f"{here}.attn.{projection.format(p)}" for p in "qkv"))
      moved.move(f"{there}_attn.proj", f"{here}.attn.{out}")
      for word, part in (("query", "q"), ("key", "k")):
        ours = f"{here}.attn.{norm.format(part)}"
        moved.move(f"{there}_attn.norm.{word}_norm", ours, leaf="scale")
      moved.move(f"{there}_mlp.0", f"{here}.{ff}.{first}")
      moved.move(f"{there}_mlp.2", f"{here}.{ff}.{last}")
  for k in range(single_layers):
    there, here = f"single_blocks.{k}", f"single_transformer_blocks.{k}"
    moved.move(f"{there}.norm.query_norm", f"{here}.attn.norm_q", leaf="scale")
    moved.move(f"{there}.norm.key_norm", f"{here}.attn.norm_k", leaf="scale")
    if second:
      moved.move(f"{there}.linear1", f"{here}.attn.to_qkv_mlp_proj")
      moved.move(f"{there}.linear2", f"{here}.attn.to_out")
    else:
      parts = [f"{here}.attn.to_{part}" for part in "qkv"]
      moved.move(f"{there}.modulation.lin", f"{here}.norm.linear")
      moved.move(f"{there}.linear1", *parts, f"{here}.proj_mlp")
      moved.move(f"{there}.linear2", f"{here}.proj_out")
  return moved.ends()


def original_file(kind, tensors):
  """The file of a module of this kind, by its tensors under diffusers' names."""
  if kind == "sd3":
    return sd3_file(tensors, SD3["num_layers"])
  return flux_file(tensors, FLUX1["num_layers"], FLUX1["num_single_layers"], kind == "flux2")


@functools.cache
def made(name):
  """(kind, config, tensors under diffusers' names, tensors of the original file)."""
  class_name, config = MODULES[name]
  module = torch_trees.randomize(getattr(diffusers, class_name)(**config))
  tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
  kind = name.split()[0]
  config = {**module.config, "_class_name": class_name}
  return kind, config, tensors, original_file(kind, tensors)


def without(name):
  return lambda file: {n: x for n, x in file.items() if n != name}


def changed(name, shape):
  return lambda file: {**file, name: torch.zeros(shape)}
