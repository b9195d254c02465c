# The programs on NVIDIA GPUs. CUDA comes with the wheels of `jax[cuda13]`, so that the image needs no
# CUDA of its own; the host needs NVIDIA's driver (580 or newer) and its Container Toolkit. From the
# root of the repository:
#
#   docker build -f launch/docker/cuda.Dockerfile -t fsdfm:cuda .
#   docker run --rm --gpus all fsdfm:cuda generate --steps=8
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" --user "$(id -u)" fsdfm:cuda \
#       train --config=paper.py:0.17B --workdir=runs/x --config.data.corpus='runs/texts/*.jsonl'
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/fsdfm
WORKDIR /src
COPY setup.py README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY fsdfm_jax fsdfm_jax
RUN /opt/fsdfm/bin/pip install --no-cache-dir ".[demo,cuda]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/fsdfm /opt/fsdfm
# With --user, HOME is this folder too: it must be writable for everyone.
RUN useradd --uid 1000 --create-home --home-dir /work fsdfm && chmod 0777 /work
ENV PATH=/opt/fsdfm/bin:$PATH HOME=/work
USER fsdfm
WORKDIR /work
ENTRYPOINT ["fsdfm"]
CMD ["--help"]
