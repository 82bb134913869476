"""Mistakes in arguments and in what they name, as Ray's command line shows them: in one line."""

from __future__ import annotations

import click

from lvlm.core.errors import ParameterError


class Mistake(click.ClickException, ParameterError):  # noqa: N818 - click's, too
    """A ParameterError that ``serve run`` prints without its traceback."""
