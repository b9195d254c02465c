# The programs on a CPU. From the root of the repository:
#
#   docker build -f launch/docker/cpu.Dockerfile -t fsdfm .
#   docker run --rm fsdfm generate --steps=8
#   docker run --rm -v "$PWD/runs:/work/runs" --user "$(id -u)" fsdfm \
#       train --config=tiny.py:smoke --workdir=runs/smoke
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/fsdfm
WORKDIR /src
COPY setup.py README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY fsdfm_jax fsdfm_jax
RUN /opt/fsdfm/bin/pip install --no-cache-dir ".[demo]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/fsdfm /opt/fsdfm
# With --user, HOME is this folder too: it must be writable for everyone.
RUN useradd --uid 1000 --create-home --home-dir /work fsdfm && chmod 0777 /work
ENV PATH=/opt/fsdfm/bin:$PATH HOME=/work
USER fsdfm
WORKDIR /work
ENTRYPOINT ["fsdfm"]
CMD ["--help"]
