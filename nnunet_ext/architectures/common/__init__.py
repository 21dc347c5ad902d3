"""What the networks of several methods share: arguments of plans, nnU-Net's own U-Nets, copies, kernels."""
