"""Starts a real NDIF server on one Linux machine, on the CPU. See README.md beside this file."""
