"""One page about the quality of a ladder."""
