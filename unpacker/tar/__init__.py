"""Tar archives: their members (`reader`), and what headers hold: `fields`, `pax` records, maps of `sparse` files."""
