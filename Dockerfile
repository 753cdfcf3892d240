# syntax=docker/dockerfile:1
# One image a kind of part, chosen by ENGINE:
#   none  ingress, scheduler, and workers of the sim and http engines
#   cpu   vLLM on the CPU
#   gpu   vLLM on CUDA; needs the NVIDIA container toolkit on the host
FROM python:3.11-slim-bookworm AS build
ARG ENGINE=none
# Where PyTorch's CPU wheels are, for when the configured package index has none.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/headrace
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY ingress ingress
COPY kvstate kvstate
COPY ops ops
COPY scheduler scheduler
COPY workers workers
RUN case "$ENGINE" in none) what=. ;; cpu|gpu) what=".[$ENGINE]" ;; *) echo "ENGINE: none, cpu or gpu" >&2; exit 1 ;; esac; \
    /opt/headrace/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$what" \
    && if [ "$ENGINE" = cpu ]; then \
         /opt/headrace/bin/pip uninstall --yes torchvision torchaudio torchcodec; fi

FROM python:3.11-slim-bookworm
ARG ENGINE=none
# Triton and torch's inductor compile kernels with the host's C compiler; vLLM's CPU build asks libnuma.
# hadolint ignore=DL3008
RUN if [ "$ENGINE" != none ]; then apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --create-home --uid 10001 headrace && install --directory --owner=headrace /data
COPY --from=build /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH PYTHONUNBUFFERED=1 HEADRACE_DATA=/data
USER 10001
WORKDIR /home/headrace
VOLUME /data
ENTRYPOINT ["headrace"]
CMD ["--help"]
