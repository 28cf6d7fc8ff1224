# A hospital: reads /data, keeps /var/lib/uharmony, opens one connection outwards and no port.
#
#   docker build --file docker/client.Dockerfile --tag uharmony-client .
#   docker run --init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     --volume /srv/uharmony/north:/etc/uharmony:ro --volume /srv/images:/data:ro \
#     --volume site:/var/lib/uharmony uharmony-client
#
# PYTHON_IMAGE may name a digest instead of a tag (python@sha256:...). TORCH is cpu, from PyTorch's
# own index, or cuda; TORCH_INDEX names a mirror of that index. Settings of pip, with a password
# if there is one, come as --secret id=pip,src=pip.conf and stay in no layer.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=cpu
ARG TORCH_INDEX=""
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/uharmony
ENV PATH=/opt/uharmony/bin:$PATH

# Version and index of PyTorch stand in these two files and nowhere else.
COPY requirements.lock ./
COPY scripts/setup scripts/setup
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
  version=$(sed -n 's/^# torch==\([0-9.]*\) .*/\1/p' requirements.lock) && \
  index=${TORCH_INDEX:-$(sed -n 's/^torch_index=//p' scripts/setup)} && \
  case "$TORCH" in \
    cpu) pip install --no-deps --only-binary=:all: --index-url "$index" "torch==$version" ;; \
    cuda) pip install --only-binary=:all: --constraint requirements.lock "torch==$version" ;; \
    *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 2 ;; \
  esac

# What the wheel needs, at the versions of the lock; tools for building stay in this stage.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
  python -m venv /opt/hatch && \
  /opt/hatch/bin/pip install --only-binary=:all: --constraint requirements.lock hatchling
COPY pyproject.toml README.md LICENSE ./
COPY uharmony_model uharmony_model
COPY service service
COPY server server
COPY client client
COPY simulation simulation
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
  /opt/hatch/bin/hatchling build --target wheel --directory /src/dist && \
  pip install --only-binary=:all: --constraint requirements.lock \
    "$(echo /src/dist/uharmony-*.whl)${EXTRAS}" && \
  pip check && pip uninstall --yes pip
COPY docker/probe.py /opt/uharmony/probe.py

FROM ${PYTHON_IMAGE}
# A number that no account of the host is likely to have; volumes belong to it.
RUN groupadd --gid 10001 uharmony && \
  useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
    --shell /usr/sbin/nologin uharmony && \
  install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/uharmony /data /codes
COPY --from=build /opt/uharmony /opt/uharmony
# Caches of libraries go where a read-only root file system lets them: into the tmpfs at /tmp.
ENV PATH=/opt/uharmony/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
  USER=uharmony HOME=/tmp XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib \
  FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
WORKDIR /var/lib/uharmony
VOLUME /var/lib/uharmony
USER 10001:10001
STOPSIGNAL SIGTERM
# No EXPOSE: nothing listens outside of loopback, where the health service answers.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
  CMD ["python", "/opt/uharmony/probe.py", "8081"]
ENTRYPOINT ["uharmony-client"]
CMD ["--site", "/etc/uharmony/site.yaml", "--health-port", "8081"]
