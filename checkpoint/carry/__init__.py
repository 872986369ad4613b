"""What of an original is handed on: to outputs, and to programs that convert it."""
