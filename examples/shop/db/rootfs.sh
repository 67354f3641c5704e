#!/bin/bash
# Makes the root file system of the database image from Debian's packages:
#
#	rootfs.sh ROOTFS DOWNLOADS
#
# Only what PostgreSQL 15 needs to run; its just-in-time compiler, and with it
# LLVM, is left out.
set -euo pipefail
root=$1 debs=$2
here=$(cd "$(dirname "$0")" && pwd)

packages=(
	postgresql-15 postgresql-client-15 tzdata busybox-static libc6 libc-bin
	libpq5 libssl3 libicu72 libxml2 libstdc++6 libgcc-s1 libreadline8 libtinfo6
	liblz4-1 libzstd1 zlib1g liblzma5 libuuid1 libselinux1 libpcre2-8-0
	libsystemd0 libcap2 libgcrypt20 libgpg-error0
	libpam0g libaudit1 libcap-ng0
	libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2 libkeyutils1
	libldap-2.5-0 libsasl2-2 libgnutls30 libp11-kit0 libidn2-0 libunistring2
	libtasn1-6 libnettle8 libhogweed6 libgmp10 libffi8
)

rm -rf "$debs" "$root"
mkdir -p "$debs" "$root"
download() {
	# As root apt hands downloading to a user who may not write here.
	(cd "$debs" && apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}")
}
# The package lists may be missing or name versions that are gone.
download 2>/dev/null || { apt-get -qq update && download; }

# Debian's base: everything lives in /usr.
mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/{etc,proc,sys,dev,run/postgresql,tmp,var/lib/postgresql/data}
for d in bin sbin lib lib64; do ln -s "usr/$d" "$root/$d"; done
chmod 1777 "$root/tmp" "$root/run/postgresql"

for deb in "$debs"/*.deb; do
	dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --no-same-owner --keep-directory-symlink \
		--exclude='./usr/share/man' --exclude='./usr/share/locale' --exclude='./usr/share/postgresql/15/man' \
		--exclude='./usr/lib/postgresql/15/lib/bitcode' --exclude='./usr/lib/postgresql/15/lib/llvmjit*' \
		--exclude='./usr/share/lintian' --exclude='./usr/share/bug'
done
find "$root/usr/share/doc" ! -type d ! -name copyright -delete

# One static program is the shell and every small tool that is not there.
"$root/bin/busybox" --list | while read -r tool; do
	[ -e "$root/bin/$tool" ] || ln -s busybox "$root/bin/$tool"
done
for tool in "$root"/usr/lib/postgresql/15/bin/*; do
	ln -sf "../lib/postgresql/15/bin/$(basename "$tool")" "$root/usr/bin/"
done
printf '%s\n' root:x:0:0:root:/:/bin/sh postgres:x:999:999:PostgreSQL:/var/lib/postgresql:/bin/sh >"$root/etc/passwd"
printf '%s\n' root:x:0: postgres:x:999: >"$root/etc/group"
install -m 755 "$here/entry.sh" "$root/entry.sh"

# A library that is not there shows now, not in the pod.
for tool in postgres initdb psql pg_isready; do
	chroot "$root" "$tool" --version >/dev/null
done
