"""gradsieve chooses the fine-tuning examples that teach a language model a domain without making it forget."""

from __future__ import annotations

__version__ = "0.1.0"
