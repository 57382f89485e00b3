# Images for linux/amd64 and linux/arm64: `cpu`, and `full` with CUDA's libraries (for driver 580 or later; 656 MB more).
#
#   docker build --target cpu -t rerankd:cpu .
#   docker build --target full -t rerankd:full .
#   docker run --stop-timeout 40 -p 8080:8080 -v rerankd-cache:/cache rerankd:cpu serve --model BAAI/bge-reranker-v2-m3
#
# docs/operations.md explains volumes, users, health checks and certificates. deploy/image/build.sh builds and tests both.
# A release names every base image with its digest: --build-arg RUST=rust:1.95-bookworm@sha256:...
ARG RUST=rust:1.95-bookworm
ARG PYTHON=python:3.13-slim-bookworm
ARG DEBIAN=debian:bookworm-slim

FROM ${RUST} AS build
ARG TARGETARCH
WORKDIR /src
COPY . .
# cargo compares file times, and the cached target folder may be younger than these files. Without `touch` it could take the
# program of another checkout.
RUN --mount=type=cache,id=rerankd-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=rerankd-target-${TARGETARCH},target=/src/target,sharing=locked \
    find src assets models build.rs -type f -exec touch {} + \
    && cargo build --release --locked --features jemalloc \
    && install -D --mode=755 target/release/rerankd /out/usr/local/bin/rerankd

# Only the program, for releases: docker build --target program --output type=local,dest=FOLDER .
FROM scratch AS program
COPY --from=build /out/usr/local/bin/rerankd /

# CUDA's libraries and their licenses from NVIDIA's wheels, and the C++ library that NVRTC needs.
FROM ${PYTHON} AS cuda
COPY deploy/image/cuda-wheels.txt /
RUN pip download --no-cache-dir --no-deps --only-binary=:all: --require-hashes --dest /wheels --requirement /cuda-wheels.txt \
    && for wheel in /wheels/*.whl; do python -m zipfile -e "$wheel" /unpacked || exit 1; done \
    && for info in /unpacked/*.dist-info; do \
        name=$(basename "${info%%-*}") \
        && install -D --mode=644 "$info/licenses/License.txt" "/out/usr/share/doc/$name/copyright" || exit 1; \
    done \
    && mkdir -p /out/usr/local/lib/cuda \
    && lib=/unpacked/nvidia/cu13/lib \
    && cp --dereference "$lib/libnvrtc.so.13" "$lib/libnvrtc-builtins.so.13.0" "$lib/libcublasLt.so.13" \
        /usr/lib/*-linux-gnu/libstdc++.so.6 /out/usr/local/lib/cuda \
    && rm -r /wheels /unpacked

# The root folder of both images: glibc and libgcc, what scanners read about them, the user, and the cache folder. It has no
# shell and no package manager.
FROM ${DEBIAN} AS root
WORKDIR /
COPY LICENSE /usr/share/doc/rerankd/copyright
RUN mkdir -p /out/dev /out/proc /out/sys /out/etc /out/tmp /out/usr/lib /out/usr/lib64 /out/var/lib/dpkg/status.d \
    && ln -s usr/lib /out/lib \
    && ln -s usr/lib64 /out/lib64 \
    && chmod 1777 /out/tmp \
    && cp --parents --dereference lib*/ld-linux-*.so.* usr/lib/*-linux-gnu/libc.so.6 usr/lib/*-linux-gnu/libm.so.6 \
        usr/lib/*-linux-gnu/libdl.so.2 usr/lib/*-linux-gnu/libpthread.so.0 usr/lib/*-linux-gnu/librt.so.1 \
        usr/lib/*-linux-gnu/libgcc_s.so.1 usr/share/doc/libc6/copyright usr/share/doc/libgcc-s1/copyright \
        usr/share/doc/rerankd/copyright etc/os-release etc/debian_version /out \
    && for package in libc6 libgcc-s1; do dpkg-query --status $package > /out/var/lib/dpkg/status.d/$package || exit 1; done \
    && echo 'hosts: files dns' > /out/etc/nsswitch.conf \
    && printf 'root:x:0:0:root:/:/nonexistent\nrerankd:x:10001:10001:rerankd:/cache:/nonexistent\n' > /out/etc/passwd \
    && printf 'root:x:0:\nrerankd:x:10001:\n' > /out/etc/group \
    && install --directory --owner=10001 --group=0 --mode=2775 /out/cache

FROM scratch AS base
COPY --from=root /out /
ENV PATH=/usr/local/bin HOME=/cache HF_HOME=/cache RERANKD_CUDA_CACHE=/cache/cuda RERANKD_HOST=0.0.0.0 RERANKD_LOG_FORMAT=json
USER 10001:10001
VOLUME ["/cache"]
EXPOSE 8080
# A first download may take long; the start period ends with the first success.
HEALTHCHECK --interval=30s --timeout=15s --start-period=30m --retries=3 CMD ["rerankd", "health"]
ENTRYPOINT ["rerankd"]
CMD ["serve"]
LABEL org.opencontainers.image.title="rerankd" \
    org.opencontainers.image.description="A self-hosted reranking server" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="https://github.com/rerankd/rerankd"

FROM base AS cpu
COPY --from=build /out /

# The libraries are a layer below the program, so that another version of the program does not transfer them again.
FROM base AS full
# /usr/local/nvidia/lib64: where Google's GPU device plug-in puts the driver. NVIDIA_DRIVER_CAPABILITIES tells NVIDIA's
# container toolkit what to mount; --gpus and device plug-ins say which GPUs.
ENV LD_LIBRARY_PATH=/usr/local/lib/cuda:/usr/local/nvidia/lib64 NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda /out /
COPY --from=build /out /
