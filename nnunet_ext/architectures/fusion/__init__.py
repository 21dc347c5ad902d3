"""FasterFusion: blocks that fuse into one convolution, and folding of batch norms."""
