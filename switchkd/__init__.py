"""switchkd: distil a language model by deciding, token by token, who writes the next token."""
