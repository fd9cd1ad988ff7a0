"""The objective as pure tensor functions: torch, and nothing else."""
