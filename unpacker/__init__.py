"""Keeps a tree of unpacked container images equal to a wishlist in git."""

__version__ = "0.1.0"
