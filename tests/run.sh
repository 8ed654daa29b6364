#!/usr/bin/env bash
# Set up the environment for development where that is not done, then check the project.
#
#   bash tests/run.sh                      lint, types, and all tests but the slow ones and those for a GPU or LeRobot
#   bash tests/run.sh --coverage           the same, and which lines the tests ran; fails below 90 % of what decides results
#   bash tests/run.sh --all                as --coverage, with the slow tests, those for a GPU where there is one, and those
#                                          for LeRobot where LEROBOT_PYTHON names an interpreter that has it
#   bash tests/run.sh tests/test_sb3_vla/runs/test_run.py    only pytest, with these arguments
#   bash tests/run.sh -m slow              the slow tests
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/examples/setup.sh" dev
python="$(cd "${SB3_VLA_VENV:-$root/.venv}/bin" && pwd)/python"

cd "$root"
export PYTHONHASHSEED=0  # so that a failure that depends on the order of a set comes again

# Two files at a time, not one a core: tests start workers of their own, and some of them measure seconds.
pytest=("$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder)
# Lines that only child processes run, as those of workers and further ranks, count as not run.
covered=(mw_envs sb3_vla/{ppo,grpo,sft,rollouts,distributions})
case "${1:-}" in
    "") ;;
    --coverage) pytest+=(--cov --cov-report=) ;;
    --all)
        pytest+=(--cov --cov-report= -m "$([ -n "${LEROBOT_PYTHON:-}" ] || echo 'not lerobot')")
        ;;
    *) exec "$python" -m pytest -q "$@" ;;
esac

step() {
    printf '\n== %s\n' "$1"
    shift
    "$@"
}
step "Lint (ruff)" "$python" -m ruff check .
step "Types (mypy)" "$python" -m mypy sb3_vla mw_envs
# From Python 3.12 on the interpreter itself tells of lines, which costs little; before, tests take up to a third longer.
if [ $# -gt 0 ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then export COVERAGE_CORE=sysmon; fi
step "Tests (pytest)" "${pytest[@]}"
if [ $# -gt 0 ]; then
    step "Lines that the tests ran" "$python" -m coverage report
    include="$(printf '%s/*,' "${covered[@]}")"
    step "Lines of what decides results" "$python" -m coverage report --include="${include%,}" --fail-under=90
fi
