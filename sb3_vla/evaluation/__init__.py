"""Success on fixed trials: protocols, results, intervals, and the callback that measures while training."""
