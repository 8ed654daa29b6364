"""A training as a directory: its state, its settings, what it tells, and how it goes on."""
