"""Comparison of two answers as pure text: forms (answers), spelling (latex), values (expression)."""
