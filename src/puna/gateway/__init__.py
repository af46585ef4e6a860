"""gateway decides where a request runs: here, in a script, or (later) elsewhere. Each place is a `types.Backend`."""
