"""`nnunet-ext benchmark`: sizes, memory and times of networks side by side."""
