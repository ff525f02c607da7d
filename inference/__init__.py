"""Running models: stores, slices, backends, runner processes, pipelines, sampling, sessions."""
