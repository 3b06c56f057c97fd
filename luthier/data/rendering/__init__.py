"""Messages to text, text to tokens, and the loss mask."""
