"""Text in and out of a model: tokenizers, the incremental detokenizer, chat formats. Import the modules themselves."""
