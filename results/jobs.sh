# Sourced by the scripts that run several jobs side by side: at most JOBS of them, one by default.
# A job that fails ends the script, by its set -e.

wait_below() {      # wait_below COUNT: until fewer than COUNT jobs run
    while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do
        wait -n
    done
}
beside() {          # beside COMMAND...: begin it, and come back when there is room for another
    "$@" &
    wait_below "${JOBS:-1}"
}
