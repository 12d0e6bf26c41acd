# Two images, each with the whole repository in /opt/megamult and its environment in /opt/megamult/.venv, ready to run
# without a network (the default corpus is in data/):
#
#     docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=ADDRESS -t megamult:cpu .
#     docker build --target gpu -t megamult:gpu .
#     docker run --rm -it --init --shm-size 1g -v "$PWD/runs:/opt/megamult/runs" megamult:cpu launch/quickstart.sh
#     docker run --rm -it --init --gpus all --ipc host --ulimit memlock=-1 megamult:gpu launch/quickstart.sh
#
# ADDRESS is PyTorch's CPU index (pytorch.org, "Start locally", shows it): without it pip finds the CUDA build, several
# GB. An index that wants a password belongs in no build argument, which the image's history shows: give a pip.conf by
# `--secret id=pip_conf,src=pip.conf`. Memory that ranks share lies in /dev/shm, for which Docker's 64 MB are too few.
# A folder mounted at runs/ must belong to the user in the container: `--build-arg UID="$(id -u)"`.

# Pinned by tag. By digest too where a build must repeat to the byte: --build-arg CPU_BASE=python@sha256:...
ARG CPU_BASE=python:3.11.15-slim-bookworm
# Python 3.12, PyTorch 2.12, CUDA 13.2, NCCL 2.30, Apex.
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.05-py3


FROM ${CPU_BASE} AS cpu

# The compiler stays in the image: DeepSpeed and torch compile operators when they first need them. The base's tag pins
# Debian's release; a version of a package here would be gone with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ procps \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --uid "$UID" --user-group --create-home --shell /bin/bash megamult \
    && install -d -o megamult -g megamult /opt/megamult
USER ${UID}
WORKDIR /opt/megamult

# What pip is told while it builds, beside pip.conf; nothing of it stays in the image's environment.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG MEGAMULT_EXTRAS=export,reproduce,test

# Dependencies first: this layer is made again when a requirement changes, not when a source file does. The package is
# installed as a link to this folder, and a link needs its target.
COPY --chown=megamult:megamult setup.py pyproject.toml constraints.txt LICENSE ./
COPY --chown=megamult:megamult launch/setup_env.sh launch/
COPY --chown=megamult:megamult megamult/__init__.py megamult/distributed/extensions.py megamult/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,mode=0444 \
    PIP_NO_CACHE_DIR=1 launch/setup_env.sh

ENV VIRTUAL_ENV=/opt/megamult/.venv \
    TORCH_EXTENSIONS_DIR=/opt/megamult/.venv/torch_extensions \
    PATH=/opt/megamult/.venv/bin:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin \
    DS_ACCELERATOR=cpu

COPY --chown=megamult:megamult README.md CONTRIBUTING.md ./
COPY --chown=megamult:megamult docs docs
COPY --chown=megamult:megamult docker docker
COPY --chown=megamult:megamult launch launch
COPY --chown=megamult:megamult megamult megamult
COPY --chown=megamult:megamult examples examples
COPY --chown=megamult:megamult tests tests

RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,mode=0444 \
    PIP_NO_CACHE_DIR=1 python docker/check_image.py && mkdir -p runs

LABEL org.opencontainers.image.title="megamult (cpu)" \
    org.opencontainers.image.description="Pretraining with learnable row and column multipliers, without a GPU" \
    org.opencontainers.image.licenses="Apache-2.0"
CMD ["bash"]


FROM ${GPU_BASE} AS gpu

# Ubuntu keeps `venv` in a package of its own.
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ procps python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's images come with a user of their own, who has the number that the first user of most machines has.
ARG UID=1000
RUN if other="$(getent passwd "$UID")"; then userdel --remove "${other%%:*}"; fi \
    && useradd --uid "$UID" --user-group --create-home --shell /bin/bash megamult \
    && install -d -o megamult -g megamult /opt/megamult
USER ${UID}
WORKDIR /opt/megamult

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG MEGAMULT_EXTRAS=export,reproduce,test
# The base pins every package that it came with, regex and typing_extensions too, which transformers and pydantic need
# newer. Our own constraints take the place of its file, with the base's torch in them.
ENV PIP_CONSTRAINT=""

# .venv sees the base's packages, and constraints.txt says that its torch stays: a second one would hide the one that
# was built for this CUDA and NCCL. setup_env.sh keeps a .venv that it finds.
COPY --chown=megamult:megamult setup.py pyproject.toml constraints.txt LICENSE ./
COPY --chown=megamult:megamult launch/setup_env.sh launch/
COPY --chown=megamult:megamult megamult/__init__.py megamult/distributed/extensions.py megamult/
COPY --chown=megamult:megamult docker/hold_base.py docker/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,mode=0444 \
    python3 docker/hold_base.py constraints.txt \
    && python3 -m venv --system-site-packages .venv \
    && PIP_NO_CACHE_DIR=1 launch/setup_env.sh

ENV VIRTUAL_ENV=/opt/megamult/.venv \
    TORCH_EXTENSIONS_DIR=/opt/megamult/.venv/torch_extensions \
    PATH=/opt/megamult/.venv/bin:$PATH

# File by file: constraints.txt is no longer the repository's.
COPY --chown=megamult:megamult README.md CONTRIBUTING.md ./
COPY --chown=megamult:megamult docs docs
COPY --chown=megamult:megamult docker docker
COPY --chown=megamult:megamult launch launch
COPY --chown=megamult:megamult megamult megamult
COPY --chown=megamult:megamult examples examples
COPY --chown=megamult:megamult tests tests

RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,mode=0444 \
    PIP_NO_CACHE_DIR=1 python docker/check_image.py --base-torch && mkdir -p runs

LABEL org.opencontainers.image.title="megamult (gpu)" \
    org.opencontainers.image.description="Pretraining with learnable row and column multipliers, on NVIDIA GPUs" \
    org.opencontainers.image.licenses="Apache-2.0"
CMD ["bash"]
