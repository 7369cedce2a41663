"""Facts, the texts that state and ask them, and their tokens.

Facts are values without words, `text` words them, and only `tokens` uses a tokenizer. It knows no model."""
