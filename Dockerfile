# align on NVIDIA GPUs: docker build -t align .
# The driver of the machine must be R580 or later; the image brings everything else.
#
# The `devel` image is needed when align runs: DeepSpeed's async_io (for `offload` to NVMe) and FlashInfer (if vLLM
# chooses it) are compiled at their first use, with nvcc and headers of the CUDA version that torch was built for, and
# Triton's kernels with the C compiler.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# libaio: DeepSpeed's offload to NVMe. ibverbs: NCCL over InfiniBand and RoCE.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ git ibverbs-providers libaio-dev libibverbs1 \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu 24.04 has no Python 3.11, for which the lock is resolved; uv installs it with its headers.
COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    VIRTUAL_ENV=/opt/align \
    PATH=/opt/align/bin:$PATH
RUN uv venv --python 3.11 /opt/align

WORKDIR /src
COPY requirements/gpu.lock requirements/gpu.lock
RUN uv pip install --no-deps -r requirements/gpu.lock
COPY pyproject.toml README.md LICENSE ./
COPY align align
COPY reward reward
COPY eval eval
COPY recipes recipes
RUN uv pip install --no-deps --no-build-isolation .

# Caches of compiled kernels go to the home directory, which any user may write, as clusters choose the user's id.
# torch asks for the user's name, which such an id lacks.
RUN useradd --uid 10001 --create-home align && chmod 1777 /home/align
ENV HOME=/home/align \
    USER=align
USER 10001
WORKDIR /home/align
ENTRYPOINT ["align"]
