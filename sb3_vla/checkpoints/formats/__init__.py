"""Published layouts of checkpoints, a file each."""
