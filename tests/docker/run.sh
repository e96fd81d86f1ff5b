#!/usr/bin/env bash
# Brings the server up as the README says, `docker compose up --wait` in a real Docker Engine, uses it through the
# published port, stops it, and takes everything down.
#
#   tests/docker/run.sh
#
# It needs root on a Debian machine, and nothing else: engine.sh says how. The first run takes three to four minutes, the
# next ones less than one. Where Docker is at hand already, this script is not needed:
#
#   docker compose up --wait && python tests/docker/check.py localhost:50051
set -euo pipefail

# shellcheck source=tests/docker/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

# ---------------------------------------------------------------------------------------------------------- the server

build

say "docker compose up --wait, port $RNNSERVE_PORT"
if compose up --wait; then
    passed "docker compose up --wait"
    container=$(compose ps --quiet server)

    say "the client, through the published port"
    "$cache/venv/bin/python" "$root/tests/docker/check.py" "127.0.0.1:$RNNSERVE_PORT" | tee -a "$results" \
        || grep -q '^FAILED' "$results" || failed "tests/docker/check.py"

    say "the container"
    # Measured inside, rather than read from the settings.
    inside() { compose exec -T server python -c "$1"; }
    status='s = dict(line.split(":\t") for line in open("/proc/self/status").read().splitlines() if ":\t" in line);'
    check "runs as a user of its own" inside 'import os; assert os.getuid() == os.getgid() == 10001'
    check "has no capabilities" inside "$status assert int(s['CapEff'], 16) == int(s['CapBnd'], 16) == 0"
    check "cannot get new privileges" inside "$status assert s['NoNewPrivs'] == '1'"
    check "has a read-only file system" inside '
import errno
try:
    open("/opt/x", "w")
except OSError as error:
    assert error.errno == errno.EROFS, error
else:
    raise AssertionError("could write")'
    # shellcheck disable=SC2016  # the shell inside
    check "is healthy by its own command" compose exec -T server rnnserve health

    remembered=$("$cache/venv/bin/python" "$root/tests/docker/check.py" "127.0.0.1:$RNNSERVE_PORT" remember)

    say "docker compose stop, under an open stream"
    coproc HOLD { exec "$cache/venv/bin/python" "$root/tests/docker/check.py" "127.0.0.1:$RNNSERVE_PORT" hold 2>&1; }
    # Copies, because the shell forgets its own when the process ends.
    exec 5<&"${HOLD[0]}" 6>&"${HOLD[1]}"
    hold_pid=$!
    read -r -t 30 line <&5 || line=
    check "a stream is open" test "$line" = holding
    started=$SECONDS
    compose stop
    # 137 is SIGKILL: the grace period was over. The period is the file's own.
    check "SIGTERM ends it with status 0" \
        test "$(docker inspect --format '{{.State.ExitCode}}' "$container")" = 0
    check "within the grace period" test "$((SECONDS - started))" -lt 20
    exec 5<&- 6>&-
    kill "$hold_pid" 2> /dev/null || true
    echo "stopped in $((SECONDS - started)) s"

    say "docker compose down, which leaves the volume, and up"
    compose down
    compose up --wait
    check "a session outlives its container" \
        "$cache/venv/bin/python" "$root/tests/docker/check.py" "127.0.0.1:$RNNSERVE_PORT" recall "$remembered"
else
    failed "docker compose up --wait"
fi

conclude
