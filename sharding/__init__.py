"""Context and KV over nodes: block store, LSH index, bucket ownership, migration plans."""
