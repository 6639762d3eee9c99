"""Settings for all tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the tests run in parallel processes
