"""The token view: which tokens the teacher pushes, as a parquet file, in the terminal, and as a page for a browser."""

# In `output_dir`, with a file and a page for each log of completions.
FOLDER = "token_scores"
