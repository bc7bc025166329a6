"""The mathematics of the diffusion process: no networks, no losses, no configuration files.

`schedules` makes a step table, `predictions` converts what a network predicts, `transitions` turns
both into the Gaussian of one reverse step, `gaussian` samples and scores it, `guidance` wraps a
network, and `rollout` runs the chain.
"""
