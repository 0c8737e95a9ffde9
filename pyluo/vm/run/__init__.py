"""Runs: pytest as a process, matrices, bisections, many jumps in a row, the kernel's selftests."""
