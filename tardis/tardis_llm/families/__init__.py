"""Model families: the table of where each keeps its FFNs, the FFNs found in a model by it, and its linear layers.

Nothing outside this shelf knows a family's attribute names.
"""
