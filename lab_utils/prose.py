"""Sentences whose numbers come from the run."""

from inspect import cleandoc

from IPython.display import Markdown, display


def say(text: str) -> None:
    """Show ``text`` as Markdown, under the cell that computed its numbers.

    The sentence reads the same in the book, in Colab and in JupyterLab, and it cannot drift from
    the table or figure that it speaks of.
    """
    display(Markdown(cleandoc(text)))
