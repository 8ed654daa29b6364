"""What knows nothing of models and algorithms: errors, paths, precision, signals."""
