"""Images by many workers, in files that are whole or absent, and their features."""
