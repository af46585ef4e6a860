"""models say which numbers are multiplied: one page a generation, over decoders they share."""
