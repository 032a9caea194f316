"""Turns data sources into datasets that `diffmoe_ep.data` reads: one file per source, which only reads, and one that
writes.
"""
