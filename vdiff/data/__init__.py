"""Images in: sources, one documented conversion, an LMDB store, and the batches that training eats."""
