"""Names of others in model cards and pages of data sets."""

import html
import re

from em_data.files import printable


def escape_markdown(text) -> str:
    """Return text from outside so that it shows as it is, on one line, in Markdown and HTML."""
    text = html.escape(printable(" ".join(str(text).split())), quote=False)
    return re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", text)
