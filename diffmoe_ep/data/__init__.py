"""Webdataset shards in, batches out, in an order that is a pure function of (seed, position)."""
