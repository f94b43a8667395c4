"""Targets: ways to publish trees (`directory`: into a directory, by hard links and renames)."""
