"""The daemon: identity, keys, mesh, supervision, HTTP API, telemetry."""
