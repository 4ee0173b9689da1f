"""Comparison of answers as pure text: forms (answers), spelling (latex), values (expression)."""
