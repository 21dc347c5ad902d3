"""The demonstration `nnunet-ext demo`: a data set, nnU-Net's own commands on it, and a report."""
