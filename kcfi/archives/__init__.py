"""Archives: lists of pairs of any length -> a table of parquet files, by one process, several, or a cluster."""
