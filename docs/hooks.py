"""The two READMEs are pages of the site, too. Their links start at their own folders; here they start at docs/."""

import re
from pathlib import Path
from typing import Any

#: pages of the site by what they show
SOURCES = {"index.md": "README.md", "doraemon-guide.md": "doraemon/README.md"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The text of a page: that of a README where the page stands for one."""
    source = SOURCES.get(page.file.src_uri)
    if source is None:
        return markdown
    text = (Path(config.config_file_path).parent / source).read_text(encoding="utf-8")
    text = text.replace("](doraemon/README.md)", "](doraemon-guide.md)")
    return re.sub(r"\]\((\.\./)?docs/", "](", text)
