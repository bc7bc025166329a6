"""Weight files: tensors under PyTorch names on disk, nested dicts of arrays in memory."""
