"""Word and vector search, mining, fusion, runs on disk, and metrics."""
