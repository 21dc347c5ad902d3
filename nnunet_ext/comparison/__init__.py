"""Reads results of standard nnU-Net runs and compares them: statistics, cost, figures, report."""
