"""What a training step of a compressed network costs."""
