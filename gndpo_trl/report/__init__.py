"""The run report: `gndpo-report RUN [RUN ...]` makes one page of what trainers have written."""
