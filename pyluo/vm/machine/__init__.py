"""Guests: the QEMU process and its keeper, the console, the watch over a guest, the post-mortem."""
