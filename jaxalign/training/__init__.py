"""The training loop's parts: state, programs, feeds, checkpoints."""
