"""The study behind docs/evidence.md: `make evidence`."""
