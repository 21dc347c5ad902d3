"""nnUNetTrainer subclasses; file and class are named alike."""
