# One image for hosts with and without a GPU: the binary with its built-in model, two CUDA libraries, a cache volume for models.
#   docker build -t rerankd .
#   docker run -p 8080:8080 -v rerankd-cache:/cache rerankd serve --model BAAI/bge-reranker-v2-m3
#   docker run --gpus all -p 8080:8080 -v rerankd-cache:/cache rerankd serve --device cuda --model BAAI/bge-reranker-v2-m3
# The CUDA libraries take 654 MB (libcublasLt 540, NVRTC 114) and need driver 580 or later. `docker build --target cpu` leaves
# them out.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --features jemalloc && cp target/release/rerankd /rerankd

FROM python:3.13-slim-bookworm AS cuda
RUN pip download --no-deps --dest /wheels nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 \
    && for wheel in /wheels/*.whl; do python -m zipfile -e "$wheel" /unpacked; done \
    && mkdir /libraries \
    && cp /unpacked/nvidia/cu13/lib/libnvrtc.so.13 /unpacked/nvidia/cu13/lib/libnvrtc-builtins.so.13.0 \
        /unpacked/nvidia/cu13/lib/libcublasLt.so.13 /libraries

FROM debian:bookworm-slim AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 rerankd \
    && install --directory --owner=rerankd /cache
COPY --from=build /rerankd /usr/local/bin/rerankd
USER rerankd
ENV HF_HOME=/cache RERANKD_CUDA_CACHE=/cache/cuda RERANKD_HOST=0.0.0.0 RERANKD_LOG_FORMAT=json
VOLUME /cache
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s --retries=3 \
    CMD curl --fail --silent "http://127.0.0.1:${RERANKD_PORT:-8080}/health" || exit 1
ENTRYPOINT ["rerankd"]
CMD ["serve"]

FROM cpu
COPY --from=cuda /libraries /usr/local/lib/cuda
# The NVIDIA variables make the container toolkit mount the driver.
ENV LD_LIBRARY_PATH=/usr/local/lib/cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
