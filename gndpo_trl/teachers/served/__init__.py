"""A teacher that vLLM servers run: the teacher, what it asks at the start, how a question is put, and the connection."""
