"""What needs another package, or serves another program. Nothing here is imported before somebody asks for it."""
