"""relinear: turn pretrained softmax-attention transformers into linear-attention hybrids."""

from __future__ import annotations

__version__ = "0.1.0"
