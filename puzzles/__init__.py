"""Built-in tasks, one puzzle a file. tasks.py has the table of them, and is what others import."""
