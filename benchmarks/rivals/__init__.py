"""Other people's ways to compress a network to a share of its flops, to compare with."""
