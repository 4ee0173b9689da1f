"""Whether two answers are equal, as pure text: forms (answers), spelling (latex), values (expression)."""
