"""Networks, built from the arguments that nnU-Net's plans hold; nothing here knows nnU-Net."""
