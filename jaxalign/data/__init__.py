"""Records that models are asked with, and stored samples with what was said of them."""
