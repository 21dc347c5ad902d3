"""Memory of training and prediction, counted on shapes at full size."""
