"""Facts about machines; nothing here compiles or runs code."""
