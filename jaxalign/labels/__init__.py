"""Rewards in, labels out."""
