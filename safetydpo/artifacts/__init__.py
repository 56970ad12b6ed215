"""What passes between stages: records, tables, adapters; the only place that builds paths and names columns."""
