# Image of all verbs: docker build -t permafrost . && docker run permafrost distill --help
# A test runs its commands in a shell; docker itself has not built it.
FROM python:3.12-slim
RUN pip install --no-cache-dir uv && useradd --create-home permafrost
WORKDIR /opt/permafrost
COPY pyproject.toml requirements.lock README.md LICENSE NOTICE ./
RUN uv pip install --system --no-cache --require-hashes -r requirements.lock
COPY pipeline pipeline
COPY stages stages
COPY conf conf
RUN uv pip install --system --no-cache --no-deps --editable .
USER permafrost
WORKDIR /home/permafrost
ENTRYPOINT ["permafrost"]
