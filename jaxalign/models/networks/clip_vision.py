"""The CLIP image tower: images to one vector each.

The vision transformer of Radford et al. 2021 (arXiv:2103.00020, section 2.4), under the parameter
names of transformers' `CLIPModel`, the spelling `pre_layrnorm` included.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import clip, layers, products
from jaxalign.types import Array

# Of the images that OpenAI trained on, red, green and blue; every published checkpoint uses them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(clip.EncoderConfig):
  """The fields of `vision_config` in a CLIP model's config.json that shape the network."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      raise ValueError(
        f"CLIPVisionConfig: image_size {self.image_size} not divisible by patch_size "
        f"{self.patch_size}"
      )


def preprocess(images: Array, image_size: int) -> Array:
  """Images `[B, H, W, 3]` in [0, 1] to the tower's input, `[B, image_size, image_size, 3]`.

  The shorter side is resized to `image_size` (bicubic, antialiased), the centre is cut out, and
  channels are normalised. Everything stays float, so gradients flow; published scores come from a
  resize that rounds to 8 bits and differ by up to 0.03 per pixel when downscaling
  (by nothing where the sizes agree).
  """
  height, width = images.shape[1:3]
  shorter = min(height, width)
  if shorter != image_size:
    height, width = image_size * height // shorter, image_size * width // shorter
    shape = (images.shape[0], height, width, 3)
    images = jax.image.resize(images, shape, "cubic", antialias=True)
  top, left = (height - image_size) // 2, (width - image_size) // 2
  images = images[:, top : top + image_size, left : left + image_size]
  return (images - jnp.array(MEAN, images.dtype)) / jnp.array(STD, images.dtype)


class VisionTransformer(nn.Module):
  """Patches, transformer without a mask, and a layer norm on the class token alone."""

  config: CLIPVisionConfig

  @nn.compact
  def __call__(self, images: Array) -> Array:
    """`[B, image_size, image_size, 3]`, as `preprocess` returns them, to `[B, D]`."""
    epsilon = self.config.layer_norm_eps
    x = Embeddings(self.config, name="embeddings")(images)
    x = layers.LayerNorm(epsilon, name="pre_layrnorm")(x)
    x, _ = clip.Encoder(self.config, name="encoder")(x)
    return layers.LayerNorm(epsilon, name="post_layernorm")(x[:, 0])


class Embeddings(nn.Module):
  """The class embedding and one embedding per patch, plus positions: `[B, 1 + N, D]`."""

  config: CLIPVisionConfig

  @nn.compact
  def __call__(self, images: Array) -> Array:
    features = self.config.hidden_size
    patches = PatchEmbedding(features, self.config.patch_size, name="patch_embedding")(images)
    init = nn.initializers.normal(features**-0.5)
    token = jnp.asarray(layers.parameter(self, "class_embedding", init, (features,)), patches.dtype)
    x = jnp.concatenate([jnp.broadcast_to(token, (len(patches), 1, features)), patches], axis=1)
    positions = layers.Embed(x.shape[1], features, name="position_embedding")
    return x + positions(jnp.arange(x.shape[1])).astype(x.dtype)


class PatchEmbedding(nn.Module):
  """A convolution without bias whose stride is its window, written as the product that it is."""

  features: int
  patch_size: int

  @nn.compact
  def __call__(self, images: Array) -> Array:  # [B, H, W, C] -> [B, H / p * W / p, features]
    p = self.patch_size
    batch, height, width, channels = images.shape
    kernel_init = nn.initializers.lecun_normal()
    kernel = layers.parameter(self, "kernel", kernel_init, (p, p, channels, self.features))
    patches = images.reshape(batch, height // p, p, width // p, p, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
    return products.matmul(patches, jnp.asarray(kernel).reshape(-1, self.features))
