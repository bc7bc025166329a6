"""PyTorch modules with every parameter random, and their weights as trees of ours."""

import pytest

torch = pytest.importorskip("torch")


def randomize(module, seed=0):
  """The module in evaluation mode; vectors are random too, because zero biases hide mistakes."""
  torch.set_num_threads(1)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 1:
        offset = 1.0 if name.endswith("weight") else 0.0
        parameter.copy_(offset + 0.3 * noise)
      else:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
  return module.eval()


def to_tree(state_dict, embeddings=()):
  """The naming rule, written out: list indices join their list, layouts become JAX's.

  `embeddings` are the modules whose weight is a table of rows, by the ends of their names.
  """
  tree = {}
  for name, tensor in state_dict.items():
    value, path = tensor.detach().float().numpy(), []
    for part in name.split("."):
      if part.isdigit():
        path[-1] += f"_{part}"
      else:
        path.append(part)
    if path[-1] == "weight" and name.removesuffix(".weight").endswith(tuple(embeddings)):
      path[-1] = "embedding"
    elif path[-1] == "weight":
      path[-1] = "scale" if value.ndim == 1 else "kernel"
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    node = tree
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = value
  return tree
