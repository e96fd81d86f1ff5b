#!/usr/bin/env bash
# Rolls the fleet of docker-compose.yml to the image that `rnnserve` names now: `docker compose build`, then this. New
# replicas come first; then the old ones drain, one after the other, and their sessions go on at the new ones. No client
# notices.
#
#   deploy/roll.sh
#
# `docker compose up` alone would replace all replicas at once.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
compose() { docker compose --profile fleet "$@"; }

mapfile -t old < <(compose ps --quiet replica)
count=${#old[@]}
[ "$count" -gt 0 ] || { echo "no replica is running: docker compose --profile fleet up --wait" >&2; exit 1; }

compose up --detach --wait --no-recreate --no-deps --scale "replica=$((2 * count))" replica
sleep 3 # Envoy looks for replicas every second, and asks new ones how they are
for replica in "${old[@]}"; do
    docker stop "$replica" > /dev/null # SIGTERM, and SIGKILL after stop_grace_period
    docker rm "$replica" > /dev/null
    sleep 3 # until Envoy knows: streams that leave the next one would be sent here in vain
done
compose up --detach --wait --no-recreate --no-deps --scale "replica=$count" replica
