"""Many environments in worker processes, in shared memory."""
