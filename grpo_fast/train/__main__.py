"""``python -m grpo_fast.train``: the same as the command ``grpo-fast``."""

import sys

from grpo_fast.train.cli import main

sys.exit(main())
