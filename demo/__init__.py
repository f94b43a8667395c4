"""What `make demo` runs: the whole way from a registry to a program inside a published root, on one machine."""
