#!/usr/bin/env bash
# Set up the environment for development where that is not done, then check the project.
#
#   bash tests/run.sh                      lint, types, and all tests but the slow ones and those for a GPU or LeRobot
#   bash tests/run.sh tests/test_sb3_vla/runs/test_run.py    only pytest, with these arguments
#   bash tests/run.sh -m slow              the slow tests
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/examples/setup.sh" dev
python="$(cd "${SB3_VLA_VENV:-$root/.venv}/bin" && pwd)/python"

cd "$root"
export PYTHONHASHSEED=0  # so that a failure that depends on the order of a set comes again
if [ $# -gt 0 ]; then
    exec "$python" -m pytest -q "$@"
fi

step() {
    printf '\n== %s\n' "$1"
    shift
    "$@"
}
step "Lint (ruff)" "$python" -m ruff check .
step "Types (mypy)" "$python" -m mypy sb3_vla mw_envs
# Two files at a time, not one a core: tests start workers of their own, and some of them measure seconds.
step "Tests (pytest)" "$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
