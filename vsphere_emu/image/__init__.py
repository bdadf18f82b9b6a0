"""The bootable image: a small Debian with a boot loader, a serial console and a service."""
