#!/usr/bin/env bash
# Brings a fleet up with its observer, `docker compose --profile fleet --profile observe`, in a real Docker Engine, and
# holds Prometheus against it: it is well by its own health check, has found every replica, has loaded every rule, draws
# its console, and answers every query of Grafana's dashboard.
#
#   tests/docker/observe.sh
#
# It needs root on a Debian machine, and nothing else: engine.sh says how. Prometheus is Debian's. Grafana is in no
# package that can be had without its image, so its container alone is not started: tests/test_deploy_files.py and
# tests/test_dashboard.py hold what is mounted into it against what it is told. Where the images can be had:
#
#   docker compose --profile fleet --profile observe up --wait
#   python tests/docker/observe.py localhost:50051 http://localhost:9090
set -euo pipefail

# shellcheck source=tests/docker/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
# shellcheck source=tests/docker/stand_ins.sh
. "$(dirname "${BASH_SOURCE[0]}")/stand_ins.sh"
stand_in_redis
stand_in_envoy
stand_in_prometheus
PROMETHEUS_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export PROMETHEUS_PORT

build

say "docker compose --profile fleet --profile observe up --wait, ports $RNNSERVE_PORT and $PROMETHEUS_PORT"
both=(--profile fleet --profile observe)
mapfile -t services < <(compose "${both[@]}" config --services | grep -vx grafana)
if compose "${both[@]}" up --wait "${services[@]}"; then
    passed "docker compose --profile fleet --profile observe up --wait ${services[*]}"
    # shellcheck disable=SC2016  # the shell inside
    check "Prometheus cannot write but where it should" compose "${both[@]}" exec -T prometheus \
        sh -c '! touch /etc/prometheus/x 2> /dev/null && ! touch /x 2> /dev/null && touch /prometheus/x'
    "$cache/venv/bin/python" "$root/tests/docker/observe.py" "127.0.0.1:$RNNSERVE_PORT" \
        "http://127.0.0.1:$PROMETHEUS_PORT" 3 | tee -a "$results" || grep -q '^FAILED' "$results" \
        || failed "tests/docker/observe.py"
else
    failed "docker compose --profile fleet --profile observe up --wait ${services[*]}"
fi
conclude
