"""The command line: the only room that may import all others. Commands import torch inside their functions."""

import logging
import warnings

# messages of libraries in a terminal that no user of vdiff can act on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a missing kernel for 4 bits, when peft imports it
warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools\.lru_cache`", UserWarning)
