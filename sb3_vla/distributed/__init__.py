"""Several processes as one training: ranks, sharded weights, ranks that a command starts itself."""
