#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that the tests of this folder need. Says nothing where all are there.
#
#     tests/cluster/install.sh         hosts, ssh, pdsh, Slurm
#     tests/cluster/install.sh --all   and what builds images and shows TensorBoard: several hundred MB
set -euo pipefail

packages=(iproute2 util-linux openssh-client openssh-server pdsh slurm-wlm munge)
case "$*" in
    "") ;;
    --all) packages+=(buildah debootstrap podman runc chromium) ;;
    *)
        sed -n 's/^# \{0,1\}//; 2,5p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac

missing=()
for package in "${packages[@]}"; do
    status="$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)"
    [[ "$status" == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} != 0 ]] || exit 0

if [[ "$EUID" != 0 ]]; then
    echo "error: only root can install ${missing[*]}: run tests/cluster/install.sh $* as root" >&2
    exit 1
fi

# A package that starts a daemon as it is installed would start Slurm or sshd on the machine itself. 101 is the answer
# of Debian's policy-rc.d that forbids it; one that is there already stays.
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
echo "installing ${missing[*]}" >&2
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: apt-get failed; its whole output is in $log" >&2
    exit 1
fi
rm -f "$log"
