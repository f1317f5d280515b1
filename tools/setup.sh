# Makes .venv and keeps it up to date. The launchers beside this file source it, and find `$root` and `$venv` set.
#
# A start compares two small files and runs neither pip nor Python. `.venv/.longnet_kit/made` says where .venv stands
# and on which interpreter; `.venv/.longnet_kit/installed` is a copy of the files that say what goes into it, written
# last. Where either is missing or differs in the first, .venv is made anew, which also repairs an interrupted set-up;
# where only the second differs, the packages are brought up to date in place.
#
# LONGNET_PYTHON names the interpreter; otherwise it is the first below that is Python 3.11 or later. pip is configured
# as anywhere else: for a build of torch without CUDA, say, let PIP_EXTRA_INDEX_URL name the index that has it.

set -eu

tools=$(dirname "$(readlink -f "$0")")
root=$(dirname "$tools")
venv=$root/.venv
state=$venv/.longnet_kit

say() { printf '%s\n' "longnet_kit: $*" >&2; }

# fail CODE WORDS...
fail() {
    code=$1
    shift
    say "$*"
    exit "$code"
}

inputs() { cat "$root/setup.cfg" "$root/pyproject.toml" "$tools/constraints.txt" "$tools/setup.sh"; }

# Whether .venv was finished once, here, on an interpreter that is still the same and that LONGNET_PYTHON agrees with.
is_whole() {
    [ -x "$venv/bin/python" ] && [ -f "$state/made" ] && [ -f "$state/installed" ] || return 1
    { IFS= read -r asked && IFS= read -r place && IFS= read -r interpreter; } <"$state/made" || return 1
    [ "${LONGNET_PYTHON:-$asked}" = "$asked" ] && [ "$place" = "$root" ] &&
        [ "$interpreter" = "$(readlink -f "$venv/bin/python")" ]
}

is_current() { inputs | cmp -s - "$state/installed"; }

# Sets `$base` to an interpreter that can make .venv.
find_python() {
    if [ -n "${LONGNET_PYTHON:-}" ]; then
        set -- "$LONGNET_PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11
    fi
    tried=
    for base in "$@"; do
        answer=$("$base" -c '
import sys
try:
    import ensurepip, venv
    print("is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else "fits")
except ImportError:
    print("has no venv module (on Debian and Ubuntu: install python3-venv)")' 2>/dev/null) || answer="does not run"
        [ "$answer" != fits ] || return 0
        tried="$tried${tried:+, }$base $answer"
    done
    fail 2 "Python 3.11 or later with its venv module is needed, but $tried." \
        "Install one, or name it: LONGNET_PYTHON=/path/to/python3 $0"
}

# Runs a command so that a signal that ends this script ends the command too.
step() {
    "$@" >&2 &
    child=$!
    trap 'kill "$child" 2>/dev/null || :; exit 129' HUP
    trap 'kill "$child" 2>/dev/null || :; exit 130' INT
    trap 'kill "$child" 2>/dev/null || :; exit 143' TERM
    result=0
    wait "$child" || result=$?
    trap - HUP INT TERM
    return "$result"
}

# pip's temporary files stay in .venv: wheels of this size do not fit every /tmp, and a killed pip leaves them.
pip_install() {
    [ -t 2 ] && quiet= || quiet=--quiet
    step env PIP_USER=0 TMPDIR="$state/tmp" "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        ${quiet:+"$quiet"} --constraint "$tools/constraints.txt" "$@" ||
        fail 1 "pip could not install the packages (see above). The next start of $0 tries again."
}

# File descriptor 9 holds the lock. pip inherits it, so that an orphaned pip keeps other starts waiting until it ends.
lock() {
    exec 9>>"$state/lock"
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    say "another start is setting up $venv; waiting for it"
    step "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || fail 1 "cannot lock $state/lock"
}

set_up() {
    if [ ! -d "$state" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        fail 2 "$venv was not made by this script, so it stays as it is. Use what is in it ($venv/bin/longnet)," \
            "or delete it and start again."
    fi
    find_python
    mkdir -p "$state"
    lock
    if ! is_whole || ! is_current; then
        whole=no
        ! is_whole || whole=yes
        rm -rf "$state/installed" "$state/tmp"
        if [ "$whole" = yes ]; then
            say "bringing $venv up to date"
        else
            say "setting up $venv (once; it takes some minutes)"
            find "$venv/" -mindepth 1 -maxdepth 1 ! -name .longnet_kit -exec rm -rf {} +
            step "$base" -m venv "$venv" || fail 1 "$base could not make $venv (see above)"
            printf '%s\n' "${LONGNET_PYTHON:-$base}" "$root" "$(readlink -f "$venv/bin/python")" >"$state/made"
        fi
        inputs >"$state/next"
        mkdir "$state/tmp"
        pip_install setuptools
        pip_install --no-build-isolation --editable "$root[dev,huggingface,tokenizers]"
        rm -rf "$state/tmp"
        mv "$state/next" "$state/installed"
    fi
    exec 9>&-
}

is_whole && is_current || set_up
