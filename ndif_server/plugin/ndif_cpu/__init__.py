"""What NDIF needs in order to serve models from a CPU. The only folder here that the server can import."""
