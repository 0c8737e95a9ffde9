"""Run tests: pytest in a process, matrices, bisections, jumps in a row, the kernel's selftests."""
