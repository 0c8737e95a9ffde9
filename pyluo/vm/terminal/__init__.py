"""A program in a guest, run on the terminal or the pipes of the host."""
