#!/usr/bin/env bash
# Set up what the project needs: a virtual environment with the tested versions.
#
#   bash examples/setup.sh          to use the project
#   bash examples/setup.sh dev      to work on it as well (dev: an extra of pyproject.toml)
#
# The environment is .venv in the checkout, or $SB3_VLA_VENV; $PYTHON names the interpreter to make it with. A call that
# finds everything in place says nothing and takes a moment; after an interrupt, call it again.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}"
venv="${SB3_VLA_VENV:-$root/.venv}"
python="$venv/bin/python"
log="$venv/setup.log"
stamp="$venv/setup${extra:+-$extra}"
unfinished="$venv/setup.unfinished" # there while packages are being installed

trap 'printf "\nsetup: interrupted; call it again to go on\n" >&2; exit 130' INT

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# stage NAME COMMAND...: one line with the seconds it took; what the command says goes to the log.
stage() {
    local name="$1" start=$SECONDS
    shift
    touch "$log" 2>/dev/null || fail "cannot write to $venv; set SB3_VLA_VENV to a folder that you may write to"
    printf 'setup: %s ... ' "$name"
    if "$@" >"$log" 2>&1; then
        printf '%d s\n' $((SECONDS - start))
    else
        printf 'failed\n'
        tail -n 15 "$log" >&2
        fail "'$name' failed; all that it said is in $log"
    fi
}

# Whether this is root in a container, which is there for one purpose and may be changed for it.
is_container_root() {
    [ "$(id -u)" = 0 ] || return
    [ -e /.dockerenv ] || [ -e /run/.containerenv ] || [ -n "${container:-}" ] ||
        systemd-detect-virt --container --quiet 2>/dev/null
}

# apt_install REASON PACKAGE...: install system packages as root in a container; elsewhere name the command and stop.
apt_install() {
    local reason="$1" as_root="" command
    shift
    if [ "$(id -u)" != 0 ]; then as_root="sudo "; fi
    command="${as_root}apt-get update && ${as_root}apt-get install -y --no-install-recommends $*"
    if ! command -v apt-get >/dev/null; then
        fail "$reason. Install what your system calls these Debian packages, then start again: $*"
    elif ! is_container_root; then
        fail "$reason. Run this, then start again: $command"
    fi
    say "$reason. Running: $command"
    apt-get update -qq >/dev/null || say "apt-get update failed; going on with the package lists at hand"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        fail "apt-get failed. Run this, then start again: $command"
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10; fi
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "expected Python 3.10 to 3.13, found $1 = $("$1" --version 2>&1 || true);" \
        "install one of these versions, or set PYTHON to its path"
}

make_venv() {
    local base version
    if [ -d "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv exists and is no virtual environment; remove it, or set SB3_VLA_VENV to another folder"
    fi
    base="$(find_python)"
    version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "Python $version lacks its venv module" "python$version-venv"
    fi
    mkdir -p "$venv"
    stage "virtual environment with Python $version" "$base" -m venv "$venv"
}

# pip gives a package its RECORD last; one without it was interrupted, and pip would take it for installed.
forget_half_installed() {
    local site
    site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    find "$site" -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/RECORD' \; -exec rm -rf '{}' +
    find "$site" -maxdepth 1 -name '~*' -exec rm -rf '{}' +
}

# What pip does file by file, on all cores. Without it, and where PYTHONDONTWRITEBYTECODE is set as in many containers,
# each process would compile all that it imports. A file for another version of Python, as some packages bring, is no
# failure.
compile_packages() {
    local site
    site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$python" -m compileall -q -j 0 -x 'site-packages/.*/tests?/' "$site" "$root/mw_envs" "$root/sb3_vla" || true
}

install_packages() {
    local pip=("$python" -m pip install --no-compile -c "$root/constraints.txt") torch
    torch="$(grep '^torch==' "$root/constraints.txt")"
    if [ -e "$unfinished" ]; then forget_half_installed; fi
    stage "pip and setuptools" "${pip[@]}" "pip>=23.1" setuptools
    touch "$unfinished"
    if [ ! -e /proc/driver/nvidia/version ] && [ -z "${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]; then
        say "no NVIDIA GPU: setting PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds makes the next download small"
    fi
    stage "$torch" "${pip[@]}" "$torch"
    stage "sb3-vla${extra:+[$extra]} and its other dependencies" \
        "${pip[@]}" --no-build-isolation -e "$root${extra:+[$extra]}"
    stage "byte code, with which a process starts in half the time" compile_packages
    rm "$unfinished"
}

if ! "$python" -c 'import pip' 2>/dev/null; then make_venv; fi

# Any stamp that names at least this extra will do. The path is part of the key: a moved checkout is installed again.
key="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
if [ -e "$unfinished" ] || ! grep -qsxF -- "$key" "$stamp"*.stamp; then
    install_packages
    printf '%s\n' "$key" >"$stamp.stamp"
fi
