"""The sections of docs/results.md, one module each: from measured results to Markdown."""
