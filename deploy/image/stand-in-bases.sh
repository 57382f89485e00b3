#!/usr/bin/env bash
# Makes the base images of the Dockerfile from Debian packages, for machines that cannot pull from an image registry.
#
#   ENGINE=podman deploy/image/stand-in-bases.sh      # as root; needs debootstrap and rustup's toolchain
#
# Sizes and libraries are those of the official Debian image. Differences: Python is Debian's, and Rust is this machine's.
#   CA_BUNDLE=FILE   certificates that the builds trust, for package mirrors behind a private CA
#   MIRROR=URL       Debian mirror
set -euo pipefail

ENGINE=${ENGINE:-podman}
CA_BUNDLE=${CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}
release=bookworm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Chroots are enough to build, and need no systemd.
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
engine() { $ENGINE "$@"; }

base() { # TAG FOLDER: builds FOLDER/Dockerfile
    engine build --quiet --network host --tag "docker.io/library/$1" "$2"
}

debootstrap --variant=minbase $release "$work/rootfs" ${MIRROR:+"$MIRROR"} > /dev/null
# As in the official slim image: no caches, manuals and locales; of the documentation only the licenses.
(
    cd "$work/rootfs"
    rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/{man,locale,info}/* dev/*
    find usr/share/doc -type f ! -name copyright -delete
)
mkdir -p "$work/rootfs/etc/ssl/certs" "$work/python" "$work/rust"
tar -C "$work/rootfs" -c . | engine import --change 'CMD ["bash"]' - docker.io/library/debian:$release-slim > /dev/null
rm -rf "$work/rootfs"

cp "$CA_BUNDLE" "$work/python/ca.crt"
cp "$CA_BUNDLE" "$work/rust/ca.crt"

cat > "$work/python/Dockerfile" <<END
FROM debian:$release-slim
RUN apt-get update -qq && apt-get install -qq --yes --no-install-recommends python3 python3-pip libstdc++6 > /dev/null \
    && ln -s /usr/bin/python3 /usr/local/bin/python && rm -rf /var/lib/apt/lists/*
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt
END
base python:3.13-slim-$release "$work/python"

toolchain=$(rustc --print sysroot)
cp -a "$toolchain" "$work/rust/toolchain"
rm -rf "$work/rust/toolchain/share/doc"
cat > "$work/rust/Dockerfile" <<END
FROM debian:$release-slim
RUN apt-get update -qq && apt-get install -qq --yes --no-install-recommends gcc g++ make pkg-config libc6-dev > /dev/null \
    && rm -rf /var/lib/apt/lists/*
COPY toolchain /usr/local/rust
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
END
base rust:1.95-$release "$work/rust"
