"""Serves one artifact over HTTP with OpenAI's API: chats, completions, and a chat page that needs nothing else."""
