"""The roots that a guest can have instead of the host's own: how they are chosen and made."""
