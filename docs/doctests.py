"""Let the site show doctests as code that stand in a docstring without the heading `Examples:`."""

import re
from typing import Any

from griffe import Extension, Object

#: from the first prompt that stands at the docstring's own indentation to its end
BARE = re.compile(r"\n\n(?=>>> )")


class Doctests(Extension):
    """Puts the heading before the first of the examples that end a docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            text, *examples = BARE.split(obj.docstring.value, maxsplit=1)
            if examples:
                indented = examples[0].replace("\n", "\n    ")
                obj.docstring.value = f"{text}\n\nExamples:\n    {indented}"
