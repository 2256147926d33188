"""Writers of Parquet data sets in the schema that the trainers read: run one with `python -m`."""
