"""engine decides what runs next: token ids in, token ids out; no text, no files, no HTTP."""
