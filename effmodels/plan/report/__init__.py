"""A plan for people: the answer, tables, pictures, comparison."""
