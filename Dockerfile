# The image that the files of --emit name:
#
#   docker build -t registry.example.com/vfun:1 .
#   docker build --build-arg EXTRAS=wandb,adamw8bit --build-arg TORCH=2.14.1 -t registry.example.com/vfun:1 .
#
# It holds no model and no data: those lie on the disk that all machines share, as does the run directory.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# What NCCL finds InfiniBand by, and what Triton compiles its kernels with (--compile). Decoders bring their own codecs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc g++ libibverbs1 ibverbs-providers \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vfun
COPY pyproject.toml README.md LICENSE ./
COPY vfun_cli ./vfun_cli
COPY templates ./templates
COPY benchmarks/results ./benchmarks/results
COPY docs/compatibility.md ./docs/compatibility.md

# The torch with which each change is tested (docs/versions.md); the index's own build, with CUDA. EXTRAS: those of
# pyproject.toml, with commas.
ARG TORCH=2.13.0
ARG EXTRAS=""
RUN pip install --no-cache-dir "torch==${TORCH}" "/opt/vfun${EXTRAS:+[$EXTRAS]}"

# Any user may run it, as Slurm and shared disks want it: a home that all can write to, and a name for one that has none.
# HF_HOME, if set to a folder of the shared disk, keeps what `vfun fetch` downloads.
RUN mkdir -m 1777 /home/vfun
ENV HOME=/home/vfun \
    USER=vfun \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/vfun

ENTRYPOINT []
CMD ["vfun", "--help"]
