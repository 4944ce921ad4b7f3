"""Data: sources of images, one documented conversion, datasets (LMDB or tar shards) and training batches."""
