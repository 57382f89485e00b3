# One image for CPU and GPU-less hosts: the binary, its built-in model, a cache volume for others.
#   docker build -t rerankd .
#   docker run -p 8080:8080 -v rerankd-cache:/cache rerankd serve --host 0.0.0.0 --model BAAI/bge-reranker-v2-m3
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/rerankd /rerankd

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 rerankd \
    && install --directory --owner=rerankd /cache
COPY --from=build /rerankd /usr/local/bin/rerankd
USER rerankd
ENV HF_HOME=/cache RERANKD_HOST=0.0.0.0 RERANKD_LOG_FORMAT=json
VOLUME /cache
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s --retries=3 \
    CMD curl --fail --silent "http://127.0.0.1:${RERANKD_PORT:-8080}/health" || exit 1
ENTRYPOINT ["rerankd"]
CMD ["serve"]
