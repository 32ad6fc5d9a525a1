"""The small library behind the book: every number of the chapters is made here."""

__version__ = "0.1.0"
