"""Prompts, as records that rewards and metrics can read."""
