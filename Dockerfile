# bpwise in a container, for CPUs:
#
#     docker build --tag bpwise .
#
# and for NVIDIA's GPUs (run it with --gpus all):
#
#     docker build --tag bpwise-cuda --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# Files are made in the folder that is mounted at /work, and belong to the user that is given:
#
#     docker run --rm --user "$(id -u)" --volume "$PWD:/work" bpwise quantize Qwen/Qwen3-0.6B Qwen3-0.6B.gguf --bpw 4.5

ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# A C compiler, which Triton's kernels need, and Python where the base has none.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/bpwise/source
RUN python3 -m venv /opt/bpwise/venv \
    && /opt/bpwise/venv/bin/pip install --no-cache-dir --constraint /opt/bpwise/source/constraints.txt \
        --index-url "${TORCH_INDEX}" torch \
    && /opt/bpwise/venv/bin/pip install --no-cache-dir --constraint /opt/bpwise/source/constraints.txt \
        '/opt/bpwise/source[gguf,mlx,engine,tasks,png]'

# Whoever runs it needs a home to keep downloads in.
RUN useradd --create-home bpwise && chmod 777 /home/bpwise
ENV HOME=/home/bpwise USER=bpwise
USER bpwise
WORKDIR /work
ENTRYPOINT ["/opt/bpwise/venv/bin/bpwise"]
