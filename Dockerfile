# KCFI on CPUs, as a user without rights, from the files of this checkout alone: docs/containers.md. `make image` builds it.

# What draws the map of `kcfi scene --site`
FROM node:22-slim AS libraries
WORKDIR /project
COPY libraries/ libraries/
RUN npm ci --prefix libraries --no-audit --no-fund && npm run --prefix libraries copy

# The wheel, with these libraries in it
FROM python:3.12-slim AS wheel
WORKDIR /project
COPY . .
COPY --from=libraries /project/kcfi/scenes/libraries/ kcfi/scenes/libraries/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist .

# What is installed, from what changes seldom to what changes often
FROM python:3.12-slim
# Pango prints report.pdf. Debian keeps but one version of a package: none can be named
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpango-1.0-0 libpangoft2-1.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 kcfi
WORKDIR /project
COPY constraints.txt ./
# An index of builds without CUDA, as PyTorch's installation page names it, saves gigabytes (docs/containers.md): of
# equal versions pip takes the one with a local suffix (+cpu)
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt torch torchvision
COPY setup.cfg ./
RUN python -c "from configparser import ConfigParser; setup = ConfigParser(); setup.read('setup.cfg'); \
    extras = setup['options.extras_require']; \
    print(setup['options']['install_requires'], *(extras[name] for name in ('serve', 'demo', 'geo')), sep='\n')" \
    > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
RUN --mount=type=bind,from=wheel,source=/project/dist,target=/project/dist \
    pip install --no-cache-dir --no-deps dist/*.whl

USER 1000
WORKDIR /home/kcfi
# the server of transformers lists the Hub's cache, and wants it to be there
RUN mkdir -p .cache/huggingface/hub
ENV PYTHONUNBUFFERED=1
EXPOSE 7860 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/', timeout=8)"]
CMD ["kcfi", "demo", "--host", "0.0.0.0"]
