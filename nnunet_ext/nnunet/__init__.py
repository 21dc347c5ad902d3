"""What nnU-Net leaves on disk, as objects: data sets, plans, model folders, checkpoints, trainers by name."""
