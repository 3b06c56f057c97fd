# The images of Luthier. Targets: api (no torch in it), worker and inference (with torch).
#
#   docker build --target api .
#   docker build --target worker --build-arg TORCH_INDEX=URL .
#
# TORCH_INDEX is a wheel index that torch is taken from. Without it torch comes from pip's own index, which on
# x86 Linux is the CUDA build: right for a GPU, and gigabytes too many for a CPU.

FROM python:3.12-slim AS base
LABEL org.opencontainers.image.title="Luthier" \
      org.opencontainers.image.description="Fine-tuning jobs as an API, OpenAI-compatible and self-hosted" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# The root file system may be read-only: caches go to /tmp, state to /var/lib/luthier.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/huggingface \
    NUMBA_CACHE_DIR=/var/lib/luthier/cache/numba \
    LUTHIER_STORAGE_URL=file:///var/lib/luthier/objects \
    LUTHIER_BASES_DIR=/var/lib/luthier/bases \
    LUTHIER_RUNS_DIR=/var/lib/luthier/runs \
    LUTHIER_CACHE_DIR=/var/lib/luthier/cache
# A fresh named volume takes the owner of the folder that it covers, so the folders are made here.
RUN groupadd --gid 10001 luthier \
 && useradd --uid 10001 --gid 10001 --no-log-init --home-dir /var/lib/luthier --shell /usr/sbin/nologin luthier \
 && mkdir -p /var/lib/luthier/objects /var/lib/luthier/bases /var/lib/luthier/runs /var/lib/luthier/cache \
      /var/lib/luthier/scratch \
 && chown -R luthier:luthier /var/lib/luthier
WORKDIR /app

# Packages before sources: a change of code rebuilds neither. The project is installed empty here.
FROM base AS api-packages
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE NOTICE && pip install --constraint constraints.txt .

FROM base AS torch-packages
ARG TORCH_INDEX=""
RUN if [ -n "${TORCH_INDEX}" ]; then pip install --index-url="${TORCH_INDEX}" "torch>=2.10"; fi
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE NOTICE && pip install --constraint constraints.txt "/app[torch,cpu]"

# The API; also runs `python -m db.migrate` and `python -m services.bootstrap`.
FROM api-packages AS api
COPY . .
RUN pip install --no-deps --force-reinstall .
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "deploy/health.py", "http://127.0.0.1:8000/readyz"]
CMD ["python", "-m", "api", "--host", "0.0.0.0", "--port", "8000"]

FROM torch-packages AS torch
COPY . .
RUN pip install --no-deps --force-reinstall .
USER 10001:10001

FROM torch AS worker
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s \
    CMD ["python", "deploy/health.py", "worker"]
CMD ["python", "-m", "worker"]

FROM torch AS inference
ENV LUTHIER_INFERENCE_URL=http://0.0.0.0:8001
EXPOSE 8001
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s \
    CMD ["python", "deploy/health.py", "http://127.0.0.1:8001/healthz", "ready"]
CMD ["python", "-m", "luthier.inference.server"]
