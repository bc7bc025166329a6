"""Programs compiled ahead of time for devices that are only described, and what is in them."""
