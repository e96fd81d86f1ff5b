#!/usr/bin/env bash
# Brings a fleet up as the README says, `docker compose --profile fleet up --wait` in a real Docker Engine: three replicas
# behind Envoy, with their sessions in Redis. While 500 sessions stream through it, one replica is killed, the fleet is
# scaled to five and back to two, and its image is rolled. Every output must be the oracle's.
#
#   tests/docker/fleet.sh [SESSIONS]
#
# It needs root on a Debian machine, and nothing else: engine.sh says how. As no image registry is needed, there are
# stand-ins for the images of Redis (Debian's) and Envoy (PyPI's), under names of their own. Where Docker is at hand
# already, this script is not needed:
#
#   docker compose --profile fleet up --wait && PYTHONPATH=tests python tests/docker/stream.py localhost:50051
set -euo pipefail

# shellcheck source=tests/docker/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
# shellcheck source=tests/docker/stand_ins.sh
. "$(dirname "${BASH_SOURCE[0]}")/stand_ins.sh"

sessions=${1:-500}
stand_in_redis
stand_in_envoy

# ----------------------------------------------------------------------------------------------------------- the fleet

build

say "docker compose --profile fleet up --wait, port $RNNSERVE_PORT"
if compose --profile fleet up --wait; then
    passed "docker compose --profile fleet up --wait"
    "$cache/venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$run/constraints.txt" "$root/models" \
        onnxruntime
    "$cache/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$root/models"

    say "the client, through Envoy"
    "$cache/venv/bin/python" "$root/tests/docker/check.py" "127.0.0.1:$RNNSERVE_PORT" | tee -a "$results" \
        || grep -q '^FAILED' "$results" || failed "tests/docker/check.py"

    say "$sessions sessions stream"
    PYTHONPATH=$root/tests "$cache/venv/bin/python" "$root/tests/docker/stream.py" "127.0.0.1:$RNNSERVE_PORT" "$sessions" \
        | tee -a "$results" || grep -q '^FAILED' "$results" || failed "tests/docker/stream.py"
else
    failed "docker compose --profile fleet up --wait"
fi
conclude
