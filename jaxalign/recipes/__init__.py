"""What made the packaged assets."""
