#!/bin/bash
# Builds a bootable disk image in a folder of its own. Runs in mount and process namespaces of its
# own: whoever kills it leaves no mount, no loop device and no process, only the folder.
#
# WORK: the folder, with `overlay/` (files that go into the image), `packages`, `enabled`, `masked`,
# `trimmed`, `copied` (a word or two a line) and `arguments` (of the kernel). Makes WORK/disk.img.
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
root=$WORK/root image=$WORK/disk.img

echo "packages"
# The initramfs is made once, below, when its configuration is there.
INITRD=No debootstrap --variant=minbase --keyring="$KEYRING" --include="$(paste -sd, "$WORK/packages")" \
    "$SUITE" "$root" "$MIRROR" || { tail -n 20 "$root/debootstrap/debootstrap.log"; exit 1; }

echo "files"
cp -r --preserve=mode --remove-destination "$WORK/overlay/." "$root/"
while read -r source target; do
    mkdir -p "$root/$target"
    cp -r --preserve=mode,links "$source/." "$root/$target/"
done <"$WORK/copied"
xargs -r systemctl --quiet --root="$root" enable <"$WORK/enabled"
xargs -r systemctl --quiet --root="$root" mask <"$WORK/masked"
kernel=$(basename "$root"/boot/vmlinuz-*)
chroot "$root" update-initramfs -c -k "${kernel#vmlinuz-}"
mkdir -p "$root/boot/extlinux"
cat >"$root/boot/extlinux/extlinux.conf" <<END
SERIAL 0 115200
DEFAULT debian
LABEL debian
    LINUX /boot/$kernel
    INITRD /boot/initrd.img-${kernel#vmlinuz-}
    APPEND $(cat "$WORK/arguments")
END
(
    cd "$root"
    # shellcheck disable=SC2046 # the words are patterns
    rm -rf -- $(cat "$WORK/trimmed")
)

echo "disk"
truncate -s "$SIZE_BYTES" "$image"
parted -s "$image" mklabel msdos mkpart primary ext4 "${OFFSET_BYTES}B" 100% set 1 boot on
dd if=/usr/lib/syslinux/mbr/mbr.bin of="$image" bs=440 count=1 conv=notrunc status=none
# SYSLINUX 6 reads neither the 64bit nor the metadata_csum feature. Tables are written now: a kernel
# that did it in the background would change an idle disk.
mkfs.ext4 -q -F -b 4096 -L root -O '^64bit,^metadata_csum' -d "$root" \
    -E "offset=$OFFSET_BYTES,lazy_itable_init=0,lazy_journal_init=0" \
    "$image" $(((SIZE_BYTES - OFFSET_BYTES) / 4096))

echo "boot loader"
mkdir "$WORK/mount"
mount -o "loop,offset=$OFFSET_BYTES" "$image" "$WORK/mount"
extlinux --install "$WORK/mount/boot/extlinux"
umount "$WORK/mount"
fallocate --dig-holes "$image"
sync "$image"
