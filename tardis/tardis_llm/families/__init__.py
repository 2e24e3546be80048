"""Model families: the table that says where each keeps its FFNs, and the FFNs and linear layers found by it.

No module outside this folder knows the attribute names of a family.
"""
