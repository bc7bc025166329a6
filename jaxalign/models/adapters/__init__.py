"""Adapters: low-rank layers, and the policy that they make."""
