"""OpenAI's wire: requests into generations, tokens into responses. Never models or storage."""
