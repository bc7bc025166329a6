"""Networks in flax.linen, and the bundle that loads them from a diffusers folder.

`stable_diffusion.load`, `.build` and `.save` are the way in; `unet`, `vae` and `clip` are the
networks, `layers` what they are made of, `lora` their adapters, `weights` the files. Nothing is
imported here, so that importing one network stays cheap.
"""
