"""Run a program in a guest on the terminal or the pipes of a process on the host."""
