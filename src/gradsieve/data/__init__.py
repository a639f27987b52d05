"""Examples in and out: read and write data files, turn conversations into tokens with a label mask, form batches."""

from gradsieve.data.read import Dataset, content_hash, overlap, read_examples, row_fields
from gradsieve.data.shapes import Format
from gradsieve.data.template import IGNORE, Excluded, Tokenized, Tokens, template_text, tokenize
from gradsieve.data.token_set import TokenSet
from gradsieve.data.write import write_jsonl, write_lines

__all__ = [
    "IGNORE",
    "Dataset",
    "Excluded",
    "Format",
    "TokenSet",
    "Tokenized",
    "Tokens",
    "content_hash",
    "overlap",
    "read_examples",
    "row_fields",
    "template_text",
    "tokenize",
    "write_jsonl",
    "write_lines",
]
