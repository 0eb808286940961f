"""HTML pages from templates, which refer to nothing outside themselves."""

from collections.abc import Callable
from typing import Any

import jinja2

from em_evaluation.numbers import (
    format_count,
    format_duration,
    format_interval,
    format_number,
    format_percent,
)

TEMPLATES = ("em_evaluation", "em_data")  # the style of all pages lies in em_data
FILTERS: dict[str, Callable[..., str]] = {
    "number": format_number,
    "interval": format_interval,
    "percent": format_percent,
    "duration": format_duration,
    "count": format_count,
}


def render_template(
    name: str, filters: dict[str, Callable[..., str]] | None = None, /, **values: Any
) -> str:
    """Return a page of a template in `templates/`.

    Args:
        filters: More filters of the template beside `FILTERS`.
        values: Variables of the template.

    Raises:
        jinja2.UndefinedError: The template names a variable that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(each) for each in TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | (filters or {})
    return environment.get_template(name).render(**values)
