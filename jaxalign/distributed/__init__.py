"""Devices, meshes and hosts."""
