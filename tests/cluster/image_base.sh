#!/usr/bin/env bash
# Makes stand-ins for the base images that the Dockerfile names, where no registry of images can be reached: under the
# same names, from Debian's packages. For tests/cluster/container.sh, which says where images are kept.
#
#     image_base.sh cpu NAME FOLDER                 Debian with a Python that looks like the `python` image's
#     image_base.sh gpu NAME FOLDER [buildah run options]
#                                                   that, with a torch of its own as NVIDIA's image has it: outside any
#                                                   .venv, a version of NVIDIA's kind, pip held to the base's versions
# shellcheck disable=SC2016 # what `script` names is expanded inside
set -euo pipefail

target="$1" name="$2" folder="$3"
shift 3
rootfs="$folder/rootfs"

inside() { buildah run --isolation chroot "$@" "$container" -- bash -euxc "$script"; }

case "$target" in
    cpu)
        if [[ ! -f "$folder/rootfs.tar" ]]; then
            rm -rf "$rootfs"
            debootstrap --variant=minbase \
                --include=ca-certificates,python3,python3-dev,python3-pip,python3-venv bookworm "$rootfs"
            rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/*
            # The device files of this machine are no part of an image.
            tar -C "$rootfs" --numeric-owner --exclude='./dev/*' -cf "$folder/rootfs.tar.part" .
            mv "$folder/rootfs.tar.part" "$folder/rootfs.tar"
            rm -rf "$rootfs"
        fi
        container="$(buildah from scratch)"
        buildah add --quiet "$container" "$folder/rootfs.tar" / >/dev/null
        buildah config --env LANG=C.UTF-8 --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
            --cmd '["python3"]' "$container"
        # What the `python` image has in /usr/local/bin; it lets pip install beside Debian's packages.
        script='for program in python3 pip3; do
    ln -s "/usr/bin/$program" "/usr/local/bin/$program"
    ln -s "/usr/bin/$program" "/usr/local/bin/${program%3}"
done
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED'
        inside
        ;;
    gpu)
        container="$(buildah from --pull-never "$CPU_BASE")"
        buildah config --env PIP_CONSTRAINT=/etc/pip/constraint.txt "$container"
        # Versions that the real one came with, older than our own pins; the user of Ubuntu's images.
        script='useradd --uid 1000 --create-home ubuntu
python3 -m pip install --no-cache-dir --root-user-action=ignore \
    torch==2.13.0 numpy==2.2.6 regex==2024.11.6 typing_extensions==4.12.2
cd "$(python3 -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))")"
sed -i "s/^Version: .*/Version: $TORCH_VERSION/" torch-*.dist-info/METADATA
mv torch-*.dist-info "torch-$TORCH_VERSION.dist-info"
sed -i "s/^__version__ = .*/__version__ = \"$TORCH_VERSION\"/; s/^cuda: .*/cuda = \"13.2\"/" torch/version.py
mkdir /etc/pip
python3 -m pip freeze --all | grep -E "^(torch|numpy|regex|typing_extensions)==" >/etc/pip/constraint.txt
cat /etc/pip/constraint.txt'
        inside --env PIP_CONSTRAINT= --env TORCH_VERSION=2.12.0a0+5aff3928d8.nv26.05 "$@"
        ;;
    *)
        sed -n '5,8s/^# \{0,4\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
buildah commit --quiet --rm "$container" "$name"
