"""The server: OpenAI's, Anthropic's and Ollama's protocols over HTTP, for whatever answers as a `types.Backend`.

`app.create_app` puts it together. A protocol is a module of routes that turns a body into a `types.Request` and events
into that protocol's answers; what all of them share (who asks, limits, errors, streams) is in modules of its own.
"""
