"""A trained model as a folder that predicts from file to file without nnU-Net and without PyTorch."""
