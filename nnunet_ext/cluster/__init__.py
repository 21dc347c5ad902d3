"""Cross-validation of several trainers and data sets: what it consists of, its jobs, and how far they are."""
