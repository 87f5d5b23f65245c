# Image of all verbs: docker build -t permafrost . && docker run permafrost distill --help
# A test runs its commands in a shell; docker itself has not built it.
FROM python:3.12-slim
# KubeRay before 1.6 probes pods with wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && \
    pip install --no-cache-dir uv && useradd --create-home --uid 1000 permafrost
WORKDIR /opt/permafrost
COPY pyproject.toml requirements.lock README.md LICENSE NOTICE ./
RUN uv pip install --system --no-cache --require-hashes -r requirements.lock
COPY pipeline pipeline
COPY stages stages
COPY conf conf
RUN uv pip install --system --no-cache --no-deps --editable .
# A number, as Kubernetes cannot tell whether a name is root (runAsNonRoot).
USER 1000
WORKDIR /home/permafrost
ENTRYPOINT ["permafrost"]
