#!/bin/sh
# Downloads what ../train/fetch.sh does, and for ../eval/collections.py three documentation packages of Debian.
set -eu
sh "$(dirname "$0")/../train/fetch.sh"
cd "${MINI_WORK:-./work}/download"
mkdir -p ../eval
for name in perl-doc python3.11-doc debian-faq; do
    apt-get download "$name"
    mkdir -p "../eval/$name"
    dpkg-deb -x "$name"_*.deb "../eval/$name"
done
