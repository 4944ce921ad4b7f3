"""One page that tells how good a ladder is."""
