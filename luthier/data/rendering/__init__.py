"""Messages to text, tokens and the mask of what is trained."""
