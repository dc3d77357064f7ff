"""A classifier of handwritten digits made of neighborhood attention, in PyTorch and in Flax."""
