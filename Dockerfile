# syntax=docker/dockerfile:1
# Two images: `api` without torch (0.6 GB), `worker` with torch and the CUDA libraries in its wheels (6 GB).
#   docker build --target api --tag weight-ablation-api .
# Both run as a user without rights and write to /tmp (and the worker to /cache) only, so the root may be read-only.

FROM python:3.12-slim-bookworm AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ablation \
 && install --directory --owner=ablation /data /checkpoints /cache
ENV ABLATION_DATA_DIR=/data ABLATION_CHECKPOINT_DIR=/checkpoints ABLATION_CACHE_DIR=/cache
LABEL org.opencontainers.image.title="weight-ablation" \
      org.opencontainers.image.description="The exact change in cross-entropy when one weight of a neural network is set to zero" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT"

FROM python AS wheel
WORKDIR /project
COPY requirements/install.txt requirements/
RUN pip install --only-binary=:all: --require-hashes --requirement requirements/install.txt
COPY pyproject.toml README.md LICENSE ./
COPY ablation ablation
COPY api api
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# In both images the lock is a layer of its own, so that a change of our code doesn't ship torch again.
FROM python AS api
RUN --mount=type=bind,source=requirements/api.txt,target=/lock.txt \
    pip install --only-binary=:all: --require-hashes --requirement /lock.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl
USER 10001
WORKDIR /tmp
ENV ABLATION_HOST=0.0.0.0 ABLATION_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "api"]

FROM python AS worker
# Triton compiles the launchers of its GPU kernels with the system's compiler, once. Any version of it will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=requirements/worker.txt,target=/lock.txt \
    pip install --only-binary=:all: --require-hashes --requirement /lock.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl
USER 10001
WORKDIR /tmp
# What torchvision downloads, it keeps below TORCH_HOME. The driver mounts what these two ask for.
# Compiled loops are kept below the other two.
ENV TORCH_HOME=/cache/torch NUMBA_CACHE_DIR=/cache/numba TRITON_CACHE_DIR=/cache/triton
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# libgomp's threads spin while they wait: several workers on one machine would be three times slower.
ENV OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
VOLUME /cache
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s CMD ["python", "-m", "worker.health"]
CMD ["python", "-m", "worker"]
