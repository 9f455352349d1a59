#!/usr/bin/env bash
# Set this machine and checkout up. Safe to run again; the second time takes about a second.
#   scripts/setup.sh run    what `rethaw up` and `make demo` need
#   scripts/setup.sh test   that, and what `make test` needs
#   scripts/setup.sh long   that, and what `make test-long` needs (a Ceph cluster's programs, about 300 MB)
# PYTHON=/path/to/python3 chooses the interpreter of .venv.
set -euo pipefail

level=${1:-run}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
exec 9<"${BASH_SOURCE[0]}"
flock 9 # two set-ups of one checkout take turns

total=3
case $level in
run) ;;
test | long) total=4 ;;
*)
    echo "setup: '$level' is not a level; write 'run', 'test' or 'long'" >&2
    exit 2
    ;;
esac

started=$SECONDS
child=
log=$(mktemp)
no_cluster=/etc/postgresql-common/createcluster.d/rethaw-setup.conf
written_no_cluster=
# Called by the trap below.
# shellcheck disable=SC2317
cleanup() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    [ -z "$written_no_cluster" ] || rm -f "$no_cluster"
    rm -f "$log"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say() { printf '%s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}
step_number=0
step() {
    step_number=$((step_number + 1))
    say "[$step_number/$total] $*"
}

# quietly LABEL COMMAND...: run with its output kept aside; show that it is alive; show the end of its output if it fails.
quietly() {
    local label=$1 begun=$SECONDS shown=$SECONDS status=0
    shift
    : >"$log"
    "$@" >"$log" 2>&1 </dev/null 9<&- &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[K      %s … %ss  %.70s' "$label" $((SECONDS - begun)) "$(tail -n 1 "$log" | tr -d '\r')"
        elif [ $((SECONDS - shown)) -ge 10 ]; then
            shown=$SECONDS
            say "      $label … $((SECONDS - begun))s  $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-90)"
        fi
        sleep 0.2
    done
    wait "$child" || status=$?
    child=
    [ ! -t 1 ] || printf '\r\033[K'
    if [ "$status" = 0 ]; then
        say "      $label: done ($((SECONDS - begun))s)"
    fi
    return "$status"
}
failed() {
    sed 's/^/      | /' "$log" | tail -n 15 >&2
    die "$*"
}

as_root() {
    [ "$(id -u)" = 0 ] || die "$1 has to be installed, which needs root; run: sudo make setup"
    command -v apt-get >/dev/null || die "$1 is missing and this is no Debian (no apt-get); install it by hand, then run this again"
}

# apt LABEL ARGUMENTS...: waits while another package manager is at work, instead of failing.
apt() {
    local label=$1 deadline=$((SECONDS + 600))
    shift
    while ! quietly "$label" env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=600 \
        -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@"; do
        grep -q 'Could not get lock\|Unable to lock' "$log" && [ "$SECONDS" -lt "$deadline" ] || return 1
        say "      another package manager is at work; waiting"
        sleep 3
    done
}
updated=
apt_install() {
    as_root "$*"
    if [ -z "$updated" ]; then
        apt "reading package lists" update || failed "apt-get update failed; see above"
        updated=1
    fi
    apt "installing $*" install --no-install-recommends "$@" || failed "could not install $*; see above"
}

# ------------------------------------------------------------------ 1 Debian packages

python=
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$(command -v "$candidate")
            return 0
        fi
    done
    return 1
}

postgres_15_or_newer() {
    local bin major
    for bin in /usr/lib/postgresql/*/bin/postgres; do
        major=${bin#/usr/lib/postgresql/}
        [ -x "$bin" ] && [ "${major%%/*}" -ge 15 ] && return 0
    done
    return 1
}

step "Debian packages"
missing=()
find_python || missing+=(python3 python3-venv)
command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ "$level" != run ]; then
    command -v git >/dev/null || missing+=(git)
    command -v node >/dev/null || missing+=(nodejs)
    command -v npm >/dev/null || missing+=(npm)
    command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
    [ -x /usr/sbin/mke2fs ] || [ -x /sbin/mke2fs ] || missing+=(e2fsprogs)
    compgen -G '/lib/*/libfuse3.so.[34]' >/dev/null || missing+=('^libfuse3-[34]$') # one a release
    if ! postgres_15_or_newer; then
        missing+=(postgresql)
        # Tests want the binaries, not a database that runs from now on.
        if [ "$(id -u)" = 0 ] && [ ! -e "$no_cluster" ]; then
            mkdir -p "$(dirname "$no_cluster")"
            written_no_cluster=1
            echo "create_main_cluster = false" >"$no_cluster"
        fi
    fi
fi
if [ "$level" = long ]; then # the tests start these themselves, on loopback; nothing runs because of the packages
    for name in ceph-mon ceph-osd radosgw; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
fi
if [ ${#missing[@]} -gt 0 ]; then
    apt_install "${missing[@]}"
    find_python || die "no Python 3.11 or newer with venv is here; install one and name it: PYTHON=/path/to/python3 make setup"
else
    say "      all there"
fi

# ------------------------------------------------------------------ 2 gVisor

# The whole text first: `grep -q` hangs up early, and under pipefail a program that still writes then counts as failed.
runsc_fits() { command -v runsc >/dev/null && [[ $(runsc help checkpoint 2>&1) == *exclude-committed-zero-pages* ]]; }

install_runsc() {
    local suite text
    as_root "runsc (gVisor, 20240729 or newer)"
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [ "$suite" = bookworm ]; then # its own runsc is of 2022 and cannot do this
        text=$("$python" scripts/apt_backports.py "$suite" 2>"$log") ||
            failed "bookworm-backports cannot be added; install runsc 20240729 or newer by hand, then run this again"
        if [ -n "$text" ]; then
            printf '%s' "$text" >/etc/apt/sources.list.d/rethaw-backports.sources
            # Only runsc may come from there.
            cat >/etc/apt/preferences.d/rethaw-backports <<PIN
Package: *
Pin: release n=$suite-backports
Pin-Priority: 1

Package: runsc
Pin: release n=$suite-backports
Pin-Priority: 600
PIN
            say "      added $suite-backports to apt (rethaw-backports.sources), for runsc only"
        fi
        apt "reading package lists" update ||
            failed "apt-get update failed; does this machine's mirror carry $suite-backports?"
        updated=1
        apt "installing runsc" install --no-install-recommends -t "$suite-backports" runsc ||
            failed "could not install runsc from $suite-backports; see above"
    else
        apt_install runsc
    fi
}

step "gVisor"
if runsc_fits; then
    text=$(runsc --version)
    say "      ${text%%$'\n'*} ($(command -v runsc))"
else
    install_runsc
    runsc_fits || die "$(command -v runsc || echo runsc) is too old to save a sandbox as needed; install runsc 20240729 or newer"
fi

# ------------------------------------------------------------------ 3 Python packages

lock=requirements/run.lock
[ "$level" = run ] || lock=requirements/dev.lock
step "Python packages into .venv"
# A set-up of more packages satisfies one of fewer.
stamp_of() { cat "$1" pyproject.toml <(echo "$root $("$python" --version)") | sha256sum | cut -d ' ' -f 1; }
want=$(stamp_of "$lock")
have=$(cat .venv/.rethaw-setup 2>/dev/null || true)
if { [ "$have" = "$want" ] || [ "$have" = "$(stamp_of requirements/dev.lock)" ]; } && .venv/bin/python -c 'import rethaw' 2>/dev/null; then
    say "      up to date"
else
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        [[ $(head -n 1 .venv/bin/pip 2>/dev/null) != *"$root/.venv/"* ]]; then
        quietly "making .venv with $python ($("$python" --version 2>&1))" "$python" -m venv --clear .venv ||
            failed "could not make .venv; see above"
    fi
    rm -f .venv/.rethaw-setup
    quietly "installing $(grep -c '^[a-z0-9].*==' "$lock") pinned packages" \
        .venv/bin/pip install --disable-pip-version-check --require-hashes -r "$lock" ||
        failed "pip could not install $lock; see above"
    quietly "installing rethaw from this checkout" \
        .venv/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable . ||
        failed "pip could not install this checkout; see above"
    printf '%s' "$want" >.venv/.rethaw-setup
fi

# ------------------------------------------------------------------ 4 Node packages (tests)

if [ "$level" != run ]; then
    step "Node packages for the client tests"
    node_want=$(sha256sum <tests/node/package-lock.json | cut -d ' ' -f 1)
    if [ "$(cat tests/node/node_modules/.rethaw-setup 2>/dev/null || true)" = "$node_want" ]; then
        say "      up to date"
    else
        quietly "installing" npm --prefix tests/node ci --ignore-scripts --no-audit --no-fund ||
            failed "npm could not install tests/node; see above"
        printf '%s' "$node_want" >tests/node/node_modules/.rethaw-setup
    fi
fi

say "Set up in $((SECONDS - started))s."
