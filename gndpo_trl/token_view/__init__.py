"""The token view: which tokens the teacher pushes, as a parquet file, in the terminal, and as a page for a browser."""

# In `output_dir`.
FOLDER = "token_scores"
