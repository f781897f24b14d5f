#!/usr/bin/env bash
# Two "machines", m1 and m2, made of this one: COMMAND runs on m1, where `ssh m2` works and asks for nothing.
#   bash tests/two_machines.sh deepspeed --hostfile hosts ...
# Each has a network, an address (10.77.0.1, 10.77.0.2), a host name, a process table and an sshd of its own; the disks
# are shared, as on a cluster. All are namespaces of the kernel, and the keys lie in a memory file system that only
# they see, so nothing outside is touched, and nothing is left when COMMAND has ended or this script was killed.
# Exit status: that of COMMAND, or 77 with the reason where this machine does not allow it.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin" # where ip and sshd are

cannot() {
    echo "no two machines: $1" >&2
    exit 77
}
[ "$(id -u)" = 0 ] || cannot "only root may make them"
for tool in ip unshare setpriv ssh sshd ssh-keygen; do
    command -v "$tool" >/dev/null || cannot "this one lacks $tool"
done
unshare --net --uts --mount --pid --fork sh -c 'mount -t tmpfs none /run && ip link add v0 type veth peer name v1' ||
    cannot "this one permits no namespaces"

world() { # COMMAND... ; process 1 of its process table: when it ends, the kernel ends everything on both machines
    mount -t tmpfs none /run
    mkdir -p /run/sshd /run/keys
    ssh-keygen -q -t ed25519 -N '' -f /run/keys/key # of the host and of the user
    printf '%s\n' '127.0.0.1 localhost' '10.77.0.1 m1' '10.77.0.2 m2' >/run/hosts
    printf '%s\n' 'HostKey /run/keys/key' 'AuthorizedKeysFile /run/keys/key.pub' 'PermitRootLogin yes' 'StrictModes no' \
        'PidFile none' 'MaxStartups 100' 'LogLevel ERROR' >/run/sshd_config
    printf '%s\n' 'IdentityFile /run/keys/key' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' \
        'LogLevel ERROR' >/run/ssh_config
    mount --bind /run/hosts /etc/hosts
    mount --bind /run/ssh_config /etc/ssh/ssh_config
    [ ! -d ~/.ssh ] || mount -t tmpfs none ~/.ssh # what the user has set up must not help
    ip netns add m1
    ip netns add m2
    ip link add eth0 netns m1 type veth peer name eth0 netns m2
    for number in 1 2; do
        ip -n "m$number" address add "10.77.0.$number/24" dev eth0
        ip -n "m$number" link set eth0 up
        ip -n "m$number" link set lo up
    done
    machine m2 sleep infinity &
    machine m1 when_reachable "$@"
}

machine() { # NAME COMMAND...
    ip netns exec "$1" unshare --uts --pid --fork --mount-proc bash -ec 'boot "$@"' boot "$@"
}

boot() { # NAME COMMAND...
    hostname "$1"
    "$(command -v sshd)" -f /run/sshd_config # insists on being called by its whole path
    "${@:2}"
}

when_reachable() { # COMMAND...
    local tries=50
    until ssh m1 true 2>/run/why && ssh m2 true 2>/run/why; do
        sleep 0.2
        ((--tries)) || {
            cat /run/why >&2
            return 1
        }
    done
    "$@"
}

export -f world machine boot when_reachable
# Killed however, this script takes the world with it.
setpriv --pdeathsig KILL unshare --mount --pid --fork --mount-proc --kill-child bash -ec 'world "$@"' world "$@" <&0 &
world=$!
trap 'kill -KILL "$world" 2>/dev/null || true' EXIT
wait "$world"
