"""The terminal: a program in a guest, on the terminal or the pipes of the host."""
