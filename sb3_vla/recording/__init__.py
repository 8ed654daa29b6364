"""Videos: files, and episodes that are filmed where they are simulated."""
