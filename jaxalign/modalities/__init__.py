"""What a sample looks like."""
