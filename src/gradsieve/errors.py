"""The exceptions a caller can act on.

    GradsieveError
    ├── InvalidArgument (ValueError)    an argument breaks a rule: "<name> must <rule>, got <value>; <cure>"
    ├── DataError (ValueError)          an input file breaks a rule: "<file>:<line>: …"
    ├── ModelError                      a model or tokenizer cannot be used
    ├── StoreError                      a store cannot be used
    │   ├── StoreMismatch               it was made with other settings (both sides are in the message)
    │   └── StoreCorrupt                bytes on disk are not the bytes that were written
    ├── MemoryLimit                     a single example does not fit in memory; the message has cures
    └── MissingExtra (ImportError)      an optional dependency is not installed; the message has the pip command

The command line prints each of these as one line and exits with status 2. Any other exception is a bug of gradsieve.
"""

from __future__ import annotations


class GradsieveError(Exception):
    """Base of every error that the user can mend."""


class InvalidArgument(GradsieveError, ValueError):
    """An argument breaks a rule; the message names it, the rule, the value and the cure."""


class DataError(GradsieveError, ValueError):
    """An input file breaks a rule; the message starts with the file and, where there is one, the line."""


class ModelError(GradsieveError):
    """A model or tokenizer cannot be used as asked."""


class StoreError(GradsieveError):
    """A gradient store cannot be used."""


class StoreMismatch(StoreError):
    """The store was made with other settings; the message shows both sides."""


class StoreCorrupt(StoreError):
    """Bytes on disk are not the bytes that were written; the message names the file."""


class MemoryLimit(GradsieveError):
    """A single example does not fit in memory beside the model; the message says what makes it smaller."""


class MissingExtra(GradsieveError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""
