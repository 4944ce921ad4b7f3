"""The command line: the only room that knows all the others. Command modules import torch inside their bodies."""
