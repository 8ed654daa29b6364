#!/usr/bin/env bash
# Collect demonstrations, imitate, improve by PPO, evaluate: sets up on the first call, goes on after an interrupt.
#
#   bash examples/quickstart.sh                                      MT10, 27 minutes on two cores of a virtual Intel Xeon
#   bash examples/quickstart.sh seed=1 run=runs/seed1                any setting of the recipe, which --dry-run prints
#   bash examples/embodiment/run_embodiment.sh metaworld_50_ppo_compact    the same over MT50, about two hours
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/embodiment/run_embodiment.sh" quickstart "$@"
