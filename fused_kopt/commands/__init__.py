"""What the command line runs: one module per command. Exit codes: 0 success, 1 a failed check, 2 a wrong or impossible request."""
