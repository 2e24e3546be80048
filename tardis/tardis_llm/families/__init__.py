"""Model families: the table of where each keeps its FFNs, and the FFNs found in a model by it.

Nothing outside this shelf knows a family's attribute names.
"""
