#!/usr/bin/env bash
# Run a recipe: sets up on the first call, goes on after an interrupt.
#
#   bash examples/embodiment/run_embodiment.sh metaworld_50_ppo_compact                    from nothing, on a laptop
#   bash examples/embodiment/run_embodiment.sh metaworld_50_ppo_openpi actor.model.model_path=FOLDER
#   bash examples/embodiment/run_embodiment.sh metaworld_50_ppo_openpi --dry-run           settings and memory
#   bash examples/embodiment/run_embodiment.sh --list                                      the recipes
#
# The recipes are in examples/embodiment/config; any of their settings can be given as key=value.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
bash "$root/examples/setup.sh"
if [ $# = 0 ]; then set -- --list; fi
exec "${SB3_VLA_VENV:-$root/.venv}/bin/python" -m sb3_vla train "$@"
