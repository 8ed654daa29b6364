"""What knows nothing of models and algorithms: errors, paths, processor and memory, precision, signals."""
