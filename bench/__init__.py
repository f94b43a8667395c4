"""What `make bench` runs: unpacker beside the tools that do the same job; see docs/benchmarks.md."""
