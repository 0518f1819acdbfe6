"""`pyargs serve`: one engine behind OpenAI's wire format, many users in one batch."""
