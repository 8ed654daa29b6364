#!/usr/bin/env bash
# Collect demonstrations, imitate, improve by PPO, evaluate: sets up on the first call, goes on after an interrupt.
#
#   bash examples/quickstart.sh             MT10, 27 minutes on two cores of a virtual Intel Xeon
#   bash examples/quickstart.sh --full      MT50, about two hours
#   bash examples/quickstart.sh --help      settings
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/examples/setup.sh"
exec "${SB3_VLA_VENV:-$root/.venv}/bin/python" "$root/examples/quickstart.py" "$@"
