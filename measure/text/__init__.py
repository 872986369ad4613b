"""Calibration and evaluation text: sources, chats, tokens, rows."""
