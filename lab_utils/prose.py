"""Sentences whose numbers come from the run."""

from inspect import cleandoc

from IPython.display import Markdown, display


def say(text: str) -> None:
    """Show ``text`` as Markdown, under the cell that computed its numbers.

    The sentence reads the same in the book, in Colab and in JupyterLab, and it cannot drift from
    the table or figure that it speaks of.
    """
    display(Markdown(cleandoc(text)))


def glue(name: str, value: float | str) -> None:
    """Keep ``value`` under ``name``, for a sentence elsewhere in the book.

    The role ``{glue:text}`` with ``name:.2f`` quotes it. The value travels in the executed notebook
    in the form that MyST-NB reads; MyST-NB itself isn't needed, so that chapters run in Colab.

    Raises
    ------
    TypeError
        If the value is neither a number nor a text: nothing else fits into a sentence.
    """
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float | str):
        raise TypeError(f"glue {name!r}: expected a number or a text, found {value!r}")
    prefix = "application/papermill.record/"
    display(
        {f"{prefix}text/plain": repr(value)},
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
        raw=True,
    )
