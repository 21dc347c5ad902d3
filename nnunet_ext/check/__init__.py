"""Does with a trainer what nnU-Net does, on a phantom: says which of nnU-Net's expectations it breaks."""
